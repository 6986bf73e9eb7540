"""One cycle of a recipe on tensors without memory: what it holds, computes and sends."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mlomae.commands.plan.engines import (
    BUFFERS,
    OPTIMIZER,
    RECORDS,
    WEIGHTS,
    PlannedEngine,
    offloads,
)
from mlomae.commands.plan.ledger import ACTIVATIONS, VECTORS, Ledger, Moment, fused_attention
from mlomae.commands.plan.zero3 import PlannedZero3
from mlomae.commands.plan.zero12 import PlannedZero12
from mlomae.hypergrad import Level, Multilevel, partition, zero_partitions
from mlomae.hypergrad.twin import Weights
from mlomae.models.mae import num_kept
from mlomae.pretraining.masks import MaskedBatch
from mlomae.pretraining.networks import BUILDERS
from mlomae.pretraining.program import losses_of
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import LevelRecipe
from mlomae.recipe.hypergradient import build_estimator
from mlomae.training.deepspeed_config import compute_dtype, level_config

IMAGES = "images"
MASKING = " of the masking network"

_ENGINES = {0: PlannedEngine, 1: PlannedZero12, 2: PlannedZero12, 3: PlannedZero3}


@dataclass(frozen=True)
class Cycle:
    """What a cycle takes on each GPU.

    Attributes:
        at_rest: between two cycles.
        moments: the fullest moment of each phase.
        host: bytes that offload keeps in host memory, by part.
        flops: of each phase, a multiplication and an addition as two, recomputation included.
        sent: bytes handed to collectives, by phase and collective.
        num_weights: of each level.
    """

    at_rest: Moment
    moments: dict[str, Moment]
    host: dict[str, int]
    flops: dict[str, float]
    sent: dict[tuple[str, str], float]
    num_weights: dict[str, int]

    @property
    def fullest(self) -> Moment:
        """The moment that decides whether the cycle fits."""
        return max(self.moments.values(), key=lambda moment: moment.total)


def simulate(
    recipe: PretrainingRecipe, deepspeed_config: Mapping[str, Any], world_size: int
) -> Cycle:
    """Run a cycle as rank 0 of so many; optimizers have their states from the beginning.

    Raises:
        UserError: the ranks cannot share a batch, or the estimator cannot work here.
    """
    ledger = Ledger(on_host=_on_host(deepspeed_config))
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    with _no_ranks(world_size), _without_memory(ledger, stage), ledger:
        return _PlannedProblem(recipe, deepspeed_config, world_size, ledger).cycle()


class _PlannedProblem:
    """The recipe's levels, and their cycle."""

    def __init__(
        self, recipe: PretrainingRecipe, config: Mapping[str, Any], world_size: int, ledger: Ledger
    ) -> None:
        # Neither flash-attn nor a compiler runs here, and neither holds more or computes more.
        changes: dict[str, Any] = {"compile_blocks": False}
        if recipe.model.attention != "math":
            changes["attention"] = "sdpa"
        model = recipe.model.model_copy(update=changes)
        recipe = recipe.model_copy(update={"model": model})
        self.recipe, self.ledger, self.world_size = recipe, ledger, world_size
        self.levels = {name: self._build(name, config) for name in recipe.levels}
        self.problem: Multilevel | None = None
        if recipe.method == "mlo_mae":
            section = recipe.hypergradient
            self.problem = Multilevel(
                self.levels.values(),
                estimator=build_estimator(section),
                keep_activations=section.keep_activations,
            )

    def _build(self, name: str, base: Mapping[str, Any]) -> Level:
        recipe, section = self.recipe, self.recipe.levels[name]
        config = level_config(base, section, name, self.world_size, "the recipe", "the JSON")
        owner = MASKING if name == "mask" else ""
        with self.ledger.part(f"{WEIGHTS}{owner}"), torch.device("meta"):
            module = BUILDERS[name](recipe)
        zero = DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
        engine = _ENGINES[int(zero.stage)](
            module,
            _optimizer(module, section),
            zero,
            compute_dtype(base),
            config["gradient_accumulation_steps"],
            config["gradient_clipping"],
            self.ledger,
            owner,
        )
        loss = losses_of(recipe)[name]
        level = Level(name, engine, num_steps=section.steps_per_cycle, **loss._asdict())
        engine.watch()
        _label(level, self.ledger)
        return level

    def cycle(self) -> Cycle:
        """All steps of a cycle; of many alike, as many as differ in what is recorded."""
        repeats = {"pretrain step": self._repeat("pretrain", self._pretrain_step)}
        if self.problem is not None:
            pretrain, classifier = (self.levels[n].model.module for n in ("pretrain", "classifier"))
            pretrain.eval()
            repeats["classifier step"] = self._repeat("classifier", self._classifier_step)
            classifier.eval()
            with self.ledger.phase("mask step"):
                self._mask_step()
            self.problem.clear()
        return self._result(repeats)

    def _repeat(self, name: str, step: Callable[[], None]) -> float:
        """Take steps of a level; returns how many of the recipe's each one stands for."""
        wanted, window = self.recipe.levels[name].steps_per_cycle, self.levels[name].window
        number = min(wanted, window + 1)
        self.levels[name].num_steps = number
        for _ in range(number):
            with self.ledger.phase(f"{name} step"):
                step()
        return wanted / number

    def _result(self, repeats: dict[str, float]) -> Cycle:
        ledger = self.ledger
        here = {part: n for part, n in ledger.live.items() if n and part not in ledger.on_host}
        return Cycle(
            at_rest=Moment("between two cycles", here),
            moments={
                name: ledger.peaks[name] for name in [*repeats, "mask step"] if name in ledger.peaks
            },
            host={part: ledger.live[part] for part in ledger.on_host if ledger.live[part]},
            flops={phase: n * repeats.get(phase, 1) for phase, n in ledger.flops.items()},
            sent={key: n * repeats.get(key[0], 1) for key, n in ledger.sent.items()},
            num_weights={
                name: sum(shape.numel() for shape in level.partition.shapes.values())
                for name, level in self.levels.items()
            },
        )

    def _pretrain_step(self) -> None:
        section, model = self.recipe.pretrain, self.recipe.model
        ratio = self.recipe.masking.mask_ratio
        keep = num_kept(model.num_patches, ratio)
        stream_batch = self._images("pretrain", section.num_views)  # parts of it are copied
        parts = stream_batch.chunk(section.gradient_accumulation_steps)
        drawn_noise = self.recipe.masking.selection == "gumbel_top_k"
        noise = self.recipe.masking.temperature if drawn_noise else 0.0
        with self.ledger.part(IMAGES):
            batches = [_Batch(part.clone(), keep, noise) for part in parts]
        self._step("pretrain", batches)

    def _classifier_step(self) -> None:
        self._step("classifier", [self._labelled("classifier")])

    def _step(self, name: str, batches: list[Any]) -> None:
        level = self.levels[name]
        level.backward(*batches)
        with self.ledger.part(RECORDS):
            level.apply()
        if self.problem is None:
            level.clear()

    def _mask_step(self) -> None:
        assert self.problem is not None
        hypergradient = self.problem.hypergradient("mask", self._labelled("mask"))
        level = self.levels["mask"]
        level.set_gradient(hypergradient.vector)
        level.apply()

    def _images(self, name: str, num_views: int = 1) -> Tensor:
        number = num_views * self.recipe.levels[name].batch_size // self.world_size
        with self.ledger.part(IMAGES):
            return torch.empty(number, 3, *self.recipe.model.image_size, device="meta")

    def _labelled(self, name: str) -> tuple[Tensor, Tensor]:
        images = self._images(name)
        sides = images.shape[-2:] if self.recipe.labelled.task == "segmentation" else ()
        with self.ledger.part(IMAGES):
            labels = torch.empty(len(images), *sides, dtype=torch.int64, device="meta")
        return images, labels


class _Batch(MaskedBatch):
    """A micro-batch whose noise is drawn on the host: there are no generators on `meta`."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _optimizer(module: nn.Module, recipe: LevelRecipe) -> torch.optim.Optimizer:
    """As `build_optimizer`, without the fused kernel, which takes no tensors without memory."""
    groups: Any = [{"params": list(module.parameters()), "weight_decay": recipe.weight_decay}]
    if not recipe.decay_norm_and_bias:
        groups = param_groups_weight_decay(module, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _label(level: Level, ledger: Ledger) -> None:
    """Give what a partition makes to its part of the memory, and let it have no scalars."""
    planned: Any = level.partition
    ledger.shard_sizes |= {shard.numel() for shard in planned.shards()}
    planned._sum_over_ranks = lambda value: 1.0
    for part, names in {
        VECTORS: ("zeros", "weights"),
        BUFFERS: ("gather", "current", "add_gradients"),
    }.items():
        for name in names:
            method = getattr(planned, name)
            setattr(planned, name, partial(_labelled, ledger, part, method))


def _labelled(ledger: Ledger, part: str, method: Any, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        if ledger.current_part == ACTIVATIONS:  # else a caller has said what it is
            stack.enter_context(ledger.part(part))
        return method(*args, **kwargs)


def _on_host(config: Mapping[str, Any]) -> frozenset[str]:
    """Parts that offload moves out of the GPU: vectors lie where the optimizer does."""
    parts: set[str] = set()
    if offloads(config, "offload_optimizer"):
        parts |= {OPTIMIZER, f"{OPTIMIZER}{MASKING}", RECORDS, VECTORS}
    if offloads(config, "offload_param"):
        parts |= {WEIGHTS, f"{WEIGHTS}{MASKING}"}
    return frozenset(parts)


@contextmanager
def _no_ranks(world_size: int) -> Iterator[None]:
    """A process group in which collectives do nothing."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_memory(ledger: Ledger, stage: int) -> Iterator[None]:
    """The few functions that have to be others where tensors have no memory.

    All such tensors have the address 0, and the helpers without memory that the program makes of
    itself would be counted. ZeRO-3's linear map is what DeepSpeed gives to the whole process.
    """
    functional = torch.nn.functional
    changes: list[tuple[Any, str, Any]] = [
        (Weights, "locate", _locate),
        (functional, "scaled_dot_product_attention", fused_attention),
    ]
    for module in (partition, zero_partitions):
        changes.append((module, "alias", partial(_uncounted, ledger, partition.alias)))
    if stage == 3:
        changes.append((functional, "linear", zero3_linear_wrap))
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _uncounted(ledger: Ledger, function: Any, *args: Any) -> Any:
    with ledger.part(None):
        return function(*args)


def _locate(weights: Any, tensor: Tensor) -> Any:
    """As `Weights.locate`."""
    if not weights._partition.is_sharded or tensor._is_zerotensor():
        return None
    storage = tensor.untyped_storage()._cdata
    for is_tangent, tensors in ((False, weights._values), (True, weights._tangents)):
        for name, weight in tensors.items():
            if weight.untyped_storage()._cdata == storage:
                return weights, weights._bucket, name, is_tangent
    return None
