"""Soft labels: label smoothing, mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) by timm."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from eval.finetuning.recipe import MixupRecipe
from mlomae.randomness import derive_seed


class Mixer:
    """Turns a rank's batch into mixed images and soft labels.

    The draws are a pure function of (seed, step, rank), so a resumed run repeats them. A step's
    batch is mixed as a whole, before it is cut into micro-batches.

    Args:
        recipe: None mixes nothing, and only smooths the labels.
        smoothing: share of each label that is spread evenly over all classes.
    """

    def __init__(
        self, recipe: MixupRecipe | None, num_classes: int, smoothing: float, seed: int, rank: int
    ) -> None:
        self.num_classes, self.smoothing = num_classes, smoothing
        self.seed, self.rank = seed, rank
        self._mixup = None
        if recipe is not None:
            settings = {"label_smoothing": smoothing, "num_classes": num_classes}
            self._mixup = Mixup(**recipe.model_dump(), **settings)  # type: ignore[no-untyped-call]

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images and soft labels, float32 [B, num_classes] whose rows sum to 1.

        Args:
            images: float32 [B, C, H, W], overwritten; B is even where images are mixed.
            labels: int64 [B].
            step: optimizer steps taken before this one.
        """
        if self._mixup is None:
            settings = {"num_classes": self.num_classes, "smoothing": self.smoothing}
            return images, mixup_target(labels, **settings)  # type: ignore[no-untyped-call]
        with _numpy_seeded(derive_seed(self.seed, step, self.rank)):
            mixed: tuple[Tensor, Tensor] = self._mixup(images, labels)
        return mixed


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator, which timm draws from, starts at a seed, and ends as it was."""
    state = np.random.get_state()
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(state)
