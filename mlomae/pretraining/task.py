"""Pretraining: the cycle of MAE and MLO-MAE as the trainer repeats it."""

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from data_ffcv import Augmentation, open_eval_loader
from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE
from mlomae.pretraining.images import LevelImages
from mlomae.pretraining.mae import Mae
from mlomae.pretraining.mlo_mae import MloMae
from mlomae.pretraining.pictures import mask_picture
from mlomae.pretraining.recipe import Recipe
from mlomae.training.engines import TrainingLevel, evaluating, full_weights
from mlomae.training.task import Task


class Pretraining(Task):
    """A cycle is k1 steps of `pretrain`, k2 of `classifier` and one of `mask`.

    For plain MAE it is k1 steps of `pretrain`.

    Args:
        method: the levels and how they step.
        images: of each level, by its name.
    """

    recipe: Recipe

    def __init__(
        self,
        recipe: Recipe,
        method: Mae | MloMae,
        levels: dict[str, TrainingLevel],
        images: dict[str, LevelImages],
    ) -> None:
        super().__init__(recipe, levels, images["pretrain"].num_images)
        self.method = method
        self.images = images
        self.grid_size = recipe.model.grid_size
        self._picture_images: Tensor | None = None

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the levels' streams at the batches of a cycle."""
        for name, level in self.recipe.levels.items():
            images = self.images[name]
            views = (images.augmentation,) * level.num_views
            self.open_stream(name, cycle, stack, images.info.path, views, images.indices)

    def cycle(self) -> None:
        """Step all levels once or as often as the recipe says."""
        for _ in range(self.recipe.pretrain.steps_per_cycle):
            *views, _ = self.draw("pretrain")
            num_parts = self.recipe.pretrain.gradient_accumulation_steps
            with self.meters.timed("time/pretrain_step"):
                parts = zip(*(view.chunk(num_parts) for view in views), strict=True)
                self.method.pretrain_step([torch.cat(part) for part in parts])
            self._measure_pretrain()
        if not isinstance(self.method, MloMae):
            return
        for _ in range(self.recipe.levels["classifier"].steps_per_cycle):
            images, targets = self.draw("classifier")
            with self.meters.timed("time/classifier_step"):
                self.method.classifier_step(images, targets)
            self.measure("classifier")
        images, targets = self.draw("mask")
        with self.meters.timed("time/mask_step"):
            self.method.mask_step(images, targets)
        self.measure("mask", norm="hypergradient_norm")

    def pictures(self) -> dict[str, np.ndarray]:
        """Masks of the same images each time, without the noise of a draw."""
        if self._picture_images is None:
            self._picture_images = self._draw_picture_images()
        pretrain, data = self.levels["pretrain"], self.recipe.data
        images, scorer = self._picture_images, self.method.picture_scorer()
        with torch.no_grad(), evaluating(pretrain):
            out = pretrain(images, scorer=scorer, num_keep=self.method.num_keep)
        return {"masks": mask_picture(pretrain.engine.module, images, out, data.mean, data.std)}

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Encoder and decoder, and the masking network."""
        yield MODEL_FILE, full_weights(self.levels["pretrain"])
        if "mask" in self.levels:
            yield MASKING_FILE, full_weights(self.levels["mask"])

    def report(self) -> list[tuple[str, str]]:
        """What classifier and mask learned from."""
        if not isinstance(self.method, MloMae):
            return []
        labelled, numbers = self.recipe.labelled, {n: i.num_images for n, i in self.images.items()}
        shares = f"{numbers['classifier']} for classifier, {numbers['mask']} for mask"
        return [("labels", f"{labelled.task}, {labelled.train} ({shares})")]

    def _measure_pretrain(self) -> None:
        self.measure("pretrain")
        self.meters.add_mask_frequency(self.method.mask_frequency)
        if (scores := self.method.scores) is not None:
            self.meters.add("masking/score_mean", float(scores.mean()))
            self.meters.add("masking/score_std", float(scores.std(dim=1).mean()))
            self.meters.add("masking/score_entropy", float(_binary_entropy(scores)))

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


def _binary_entropy(scores: Tensor) -> Tensor:
    """Mean entropy of scores read as probabilities, nats; log 2 for undecided ones."""
    p = scores.double().clamp(1e-12, 1 - 1e-12)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()
