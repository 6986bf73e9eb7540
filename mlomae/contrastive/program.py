"""The programs of the second and the third step of MAE-CT: from a recipe to engine and task."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_ffcv import Augmentation, ImagesInfo, inspect_images
from mlomae import checkpoint
from mlomae.contrastive.encoder import (
    FrozenEncoder,
    LowerEncoder,
    TunedEncoder,
    UpperEncoder,
    tuned_param_groups,
)
from mlomae.contrastive.heads import build_head, load_head, part, read_head
from mlomae.contrastive.loss import NnclrLoss
from mlomae.contrastive.queue import Queue
from mlomae.contrastive.recipe import ContrastRecipe, HeadRun, TuneRun
from mlomae.contrastive.target import TargetProjector
from mlomae.contrastive.task import HeadTask, TuneTask
from mlomae.errors import UserError
from mlomae.models.contrastive import NnclrHead
from mlomae.training.averaging import WeightAverage
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles
from mlomae.training.vit import build_vit, check_encoder, load_encoder

R = TypeVar("R", HeadRun, TuneRun)


class ContrastProgram(Program[R]):
    """What both steps share.

    Args:
        awaited: steps that run before this one and have yet to make what it starts from.

    Attributes:
        info: of the training images, once `check` has looked at them.
        views: what is done to them.
    """

    info: ImagesInfo
    views: tuple[Augmentation, Augmentation]

    def __init__(self, awaited: Sequence[str] = ()) -> None:
        self.awaited = awaited

    def check(self, job: Job[R]) -> None:
        """Images and encoder must fit the recipe."""
        self.info, self.views = plan_views(job.recipe)
        recipe = job.recipe
        if not job.is_continued and "pretrain" not in self.awaited:
            check_encoder(recipe.model, recipe.init_from, recipe.init_from_expected)

    def vit(self, job: Job[R]) -> VisionTransformer:
        """The encoder as the run started with it, in float32 on the CPU.

        A run that goes on takes it from its checkpoint, so that the weights which it started
        from may be gone. What is tuned comes from the engine's checkpoint later on.
        """
        recipe = job.recipe
        paths, expected = recipe.init_from, recipe.init_from_expected
        if job.is_continued:
            newest = checkpoint.latest(recipe.output_dir / "checkpoints")
            assert newest is not None
            paths, expected = (newest,), ()
        vit = untrained_vit(recipe)
        load_encoder(vit, recipe.model, paths, expected)
        return vit

    def loss(self, recipe: R, level: ContrastRecipe) -> NnclrLoss:
        """The loss of the recipe's level, with a queue of random vectors."""
        nnclr = recipe.nnclr
        queue = Queue(
            nnclr.queue_size,
            nnclr.projection_dim,
            seed=recipe.seed,
            device=torch.device(get_accelerator().current_device_name()),
            sharded=nnclr.queue_layout == "sharded",
        )
        return NnclrLoss(recipe.level_name, queue, level.temperature, level.top_k, recipe.seed)


class HeadProgram(ContrastProgram[HeadRun]):
    """The second step: a head on the frozen encoder."""

    schema = HeadRun

    def module(self, recipe: HeadRun, name: str) -> nn.Module:
        """The untrained head."""
        return build_head(recipe)

    def build(self, job: Job[HeadRun]) -> HeadTask:
        """The head on an engine, the encoder beside it."""
        recipe, loss = job.recipe, self.loss(job.recipe, job.recipe.head)
        vit = self.vit(job)
        frozen = _on_first_rank(vit)
        level = job.build_level(
            "head",
            build_head(recipe),
            loss=loss,
            num_cycles=count_cycles(recipe, self.info.num_samples),
        )
        encoder = FrozenEncoder(vit).to(level.engine.device, job.compute_dtype)
        return HeadTask(recipe, level, encoder, frozen, loss, self.info, self.views)


class TuneProgram(ContrastProgram[TuneRun]):
    """The third step: the upper blocks of the encoder and the head."""

    schema = TuneRun

    def module(self, recipe: TuneRun, name: str) -> nn.Module:
        """The upper part of an untrained encoder with an untrained head."""
        upper = UpperEncoder(untrained_vit(recipe), recipe.num_frozen_blocks)
        return TunedEncoder(upper, build_head(recipe))

    def check(self, job: Job[TuneRun]) -> None:
        """Images, encoder and head must fit the recipe."""
        super().check(job)
        if not job.is_continued and "head" not in self.awaited:
            read_head(job.recipe)

    def build(self, job: Job[TuneRun]) -> TuneTask:
        """Upper encoder and head on an engine, the lower encoder and the averages beside it."""
        recipe, loss = job.recipe, self.loss(job.recipe, job.recipe.tune)
        vit, head = self.vit(job), build_head(recipe)
        state = {} if job.is_continued else read_head(recipe)
        load_head(head, loss.queue, state)
        lower = LowerEncoder(vit, recipe.num_frozen_blocks)
        module = TunedEncoder(UpperEncoder(vit, recipe.num_frozen_blocks), head)
        frozen, device = _on_first_rank(lower), loss.queue.device
        loss.target = target = build_target(recipe, head, state, device, job.compute_dtype)
        level = job.build_level(
            "tune",
            module,
            loss=loss,
            num_cycles=count_cycles(recipe, self.info.num_samples),
            param_groups=tuned_param_groups(module, recipe.model.depth, recipe.tune),
        )
        encoder = lower.to(device, job.compute_dtype)
        task = TuneTask(recipe, level, encoder, frozen, loss, self.info, self.views)
        task.target, task.average = target, WeightAverage(level, recipe.tune.ema_decay)
        return task


def build_target(
    recipe: TuneRun,
    head: NnclrHead,
    state: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> TargetProjector:
    """The average of a head's projector: a copy of it, or as a head file of a third step has it.

    Args:
        state: what `read_head` gave.
    """
    target = TargetProjector(head.projector, recipe.tune.target_ema_decay, device, dtype)
    if averaged := part(state, "target_projector."):
        target.load_state_dict(averaged)
    return target


def plan_views(recipe: Any) -> tuple[ImagesInfo, tuple[Augmentation, Augmentation]]:
    """The training images and what is done to each of their two views.

    Raises:
        UserError, DataError: they do not fit the recipe.
    """
    info = inspect_images(recipe.data.train)
    if info.labels is None:
        raise UserError(
            f"data.train {recipe.data.train} holds masks: give a file with class labels"
        )
    recipe.check_num_images(info.num_samples)
    first, other = recipe.train_augmentation, recipe.level.second_augmentation
    second = first if other is None else other.build(recipe.model.image_size)
    for view in (first, second):
        view.check_fits(info)
    return info, (first, second)


def untrained_vit(recipe: HeadRun | TuneRun) -> VisionTransformer:
    """The recipe's encoder; its final norm comes before pooling, as in MAE-CT."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_vit(recipe.model, fc_norm=False)


def _on_first_rank(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state where files are written; others need none."""
    if dist.get_rank():
        return {}
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
