"""Pretraining: the cycles of MAE and MLO-MAE as the trainer repeats them."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import numpy as np
import torch
from torch import Tensor

from data_ffcv import Augmentation, open_eval_loader
from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE
from mlomae.errors import UserError
from mlomae.models import Scorer
from mlomae.pretraining.images import LevelImages
from mlomae.pretraining.mae import BaselineReconstruction
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import (
    Choice,
    CoupledReconstruction,
    FrozenReconstruction,
    MloMaeProblem,
)
from mlomae.pretraining.pictures import mask_picture
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe.hypergradient import build_estimator
from mlomae.training.engines import TrainingLevel, evaluating, full_weights
from mlomae.training.task import Task


class Pretraining(Task):
    """What both methods share: the steps of `pretrain`, pictures of masks, weights.

    Args:
        images: of each level, by its name.
    """

    recipe: PretrainingRecipe

    def __init__(
        self,
        recipe: PretrainingRecipe,
        levels: dict[str, TrainingLevel],
        images: dict[str, LevelImages],
    ) -> None:
        super().__init__(recipe, levels, images["pretrain"].num_images)
        self.images = images
        self.pretrain = levels["pretrain"]
        self.schedule = MaskSchedule.of(recipe, self.pretrain.total_steps)
        self.grid_size = recipe.model.grid_size
        self._picture_images: Tensor | None = None

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the levels' streams at the batches of a cycle."""
        for name, level in self.recipe.levels.items():
            images = self.images[name]
            views = (images.augmentation,) * level.num_views
            self.open_stream(name, cycle, stack, images.info.path, views, images.indices)

    @abstractmethod
    def pretrain_step(self, micro_batches: list[Tensor]) -> Tensor:
        """One step of the encoder and decoder.

        Args:
            micro_batches: images [B, C, H, W], as many as the level accumulates.

        Returns:
            The mask of the latest micro-batch [B, N], 1 where a patch was hidden.
        """

    @abstractmethod
    def picture_scorer(self) -> Scorer:
        """Scores images for a picture, without the noise of a draw; the same on all ranks."""

    def take_pretrain_steps(self) -> None:
        """Draw the batches of a cycle's steps of `pretrain`, step, and measure."""
        num_parts = self.recipe.pretrain.gradient_accumulation_steps
        for _ in range(self.recipe.pretrain.steps_per_cycle):
            *views, _ = self.draw("pretrain")
            with self.meters.timed("time/pretrain_step"):
                parts = zip(*(view.chunk(num_parts) for view in views), strict=True)
                mask = self.pretrain_step([torch.cat(part) for part in parts])
            self.measure("pretrain")
            self.meters.add_mask_frequency(mask.mean(dim=0))

    def pictures(self) -> dict[str, np.ndarray]:
        """Masks of the same images each time, without the noise of a draw."""
        if self._picture_images is None:
            self._picture_images = self._draw_picture_images()
        images, data = self._picture_images, self.recipe.data
        num_keep = self.schedule.num_keep(self.pretrain.num_steps_done)
        with torch.no_grad(), evaluating(self.pretrain):
            out = self.pretrain(images, scorer=self.picture_scorer(), num_keep=num_keep)
        model = self.pretrain.engine.module
        return {"masks": mask_picture(model, images, out, data.mean, data.std)}

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Encoder and decoder."""
        yield MODEL_FILE, full_weights(self.pretrain)

    def _draw_picture_images(self) -> Tensor:
        """The mask level's first images, which few or no encoder steps train on; not augmented."""
        recipe, name = self.recipe, "mask" if "mask" in self.images else "pretrain"
        images = self.images[name]
        indices = np.arange(images.info.num_samples) if images.indices is None else images.indices
        size, count = recipe.model.image_size, recipe.monitor.num_pictures
        loader = open_eval_loader(
            images.info.path,
            augmentation=Augmentation(kind="center_crop", image_size=size, resize=size),
            indices=indices[:count],
            batch_size=count,
            mean=recipe.data.mean,
            std=recipe.data.std,
            backend=recipe.data.backend,
            device=self.device,
        )
        first: Tensor = next(iter(loader))[0]
        return first


class MaePretraining(Pretraining):
    """Plain MAE: a cycle is k1 steps of `pretrain`."""

    @property
    def loss(self) -> BaselineReconstruction:
        """The loss of `pretrain`, which remembers its latest mask."""
        return cast(BaselineReconstruction, self.pretrain.loss)

    def cycle(self) -> None:
        """Step as often as the recipe says."""
        self.take_pretrain_steps()

    def pretrain_step(self, micro_batches: list[Tensor]) -> Tensor:
        """One step with masks that nothing learns."""
        step = self.pretrain.num_steps_done
        self.pretrain.step(*self.schedule.batches(micro_batches, step))
        return self.loss.mask

    def picture_scorer(self) -> Scorer:
        """Masks of the recipe's kind, drawn from its seed."""
        generator = torch.Generator(self.device).manual_seed(self.schedule.seed)
        num_keep = self.schedule.num_keep(self.pretrain.num_steps_done)
        return self.loss.make_scorer(generator, num_keep)


class MloMaePretraining(Pretraining):
    """MLO-MAE: a cycle is k1 steps of `pretrain`, k2 of `classifier` and one of `mask`.

    Raises:
        UserError: the recipe's estimator cannot work with these engines.
    """

    def __init__(
        self,
        recipe: PretrainingRecipe,
        levels: dict[str, TrainingLevel],
        images: dict[str, LevelImages],
    ) -> None:
        super().__init__(recipe, levels, images)
        section = recipe.hypergradient
        try:
            self.problem = MloMaeProblem(
                **levels,
                estimator=build_estimator(section),
                schedule=self.schedule,
                keep_activations=section.keep_activations,
            )
        except ValueError as error:
            raise UserError(
                f"hypergradient.estimator {section.estimator} cannot be used: {error}"
            ) from None

    def cycle(self) -> None:
        """Step the lower levels as often as the recipe says, and the mask once."""
        self.take_pretrain_steps()
        for _ in range(self.recipe.levels["classifier"].steps_per_cycle):
            images, targets = self.draw("classifier")
            with self.meters.timed("time/classifier_step"):
                self.problem.classifier_step(images, targets)
            self.measure("classifier")
        images, targets = self.draw("mask")
        with self.meters.timed("time/mask_step"):
            self.problem.mask_step(images, targets)
        self.measure("mask", norm="hypergradient_norm")

    def pretrain_step(self, micro_batches: list[Tensor]) -> Tensor:
        """One step with learned masks."""
        self.problem.pretrain_step(micro_batches)
        return self.choice.mask

    @property
    def choice(self) -> Choice:
        """Which patches the latest encoder step hid, and why."""
        return cast(FrozenReconstruction | CoupledReconstruction, self.pretrain.loss).choice

    def measure(self, name: str, norm: str = "grad_norm") -> None:
        """Of `pretrain`, the scores as well."""
        super().measure(name, norm)
        if name == "pretrain":
            scores = self.choice.scores
            self.meters.add("masking/score_mean", float(scores.mean()))
            self.meters.add("masking/score_std", float(scores.std(dim=1).mean()))
            self.meters.add("masking/score_entropy", float(_binary_entropy(scores)))

    def picture_scorer(self) -> Scorer:
        """The masking network."""
        return self.levels["mask"]

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Encoder and decoder, and the masking network."""
        yield from super().weights()
        yield MASKING_FILE, full_weights(self.levels["mask"])

    def report(self) -> list[tuple[str, str]]:
        """What classifier and mask learned from."""
        labelled, numbers = self.recipe.labelled, {n: i.num_images for n, i in self.images.items()}
        shares = f"{numbers['classifier']} for classifier, {numbers['mask']} for mask"
        return [("labels", f"{labelled.task}, {labelled.train} ({shares})")]


def _binary_entropy(scores: Tensor) -> Tensor:
    """Mean entropy of scores read as probabilities, nats; log 2 for undecided ones."""
    p = scores.double().clamp(1e-12, 1 - 1e-12)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()
