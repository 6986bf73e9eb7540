"""Plain MAE: one level, masks that nothing learns."""

from collections.abc import Callable

import torch
from torch import Tensor

from mlomae.hypergrad.losses import Models
from mlomae.models import Scorer, block_scores, random_scores, reconstruction_loss
from mlomae.pretraining.masks import MaskedBatch, MaskSchedule
from mlomae.pretraining.recipe import Recipe
from mlomae.training.engines import TrainingLevel

MakeScorer = Callable[[torch.Generator, int], Scorer]
"""From a generator and the number of visible patches to the scores of a batch."""


def baseline_scorer(recipe: Recipe) -> MakeScorer:
    """The masks of a recipe without a masking network: random, or block-wise."""
    if recipe.masking.network == "random":
        return lambda generator, num_keep: random_scores(generator)
    rows, columns = recipe.model.grid_size
    return lambda generator, num_keep: block_scores(
        (rows, columns), rows * columns - num_keep, generator
    )


class BaselineReconstruction:
    """The mean loss of the hidden patches (He et al., arXiv 2111.06377).

    Attributes:
        mask: [B, N], of the latest micro-batch.
    """

    mask: Tensor

    def __init__(self, make_scorer: MakeScorer) -> None:
        self.make_scorer = make_scorer

    def __call__(self, models: Models, batch: MaskedBatch) -> Tensor:
        assert batch.num_keep is not None
        scorer = self.make_scorer(batch.generator(), batch.num_keep)
        out = models["pretrain"](batch.images, scorer=scorer, num_keep=batch.num_keep)
        self.mask = out["mask"]
        return reconstruction_loss(out["patch_loss"], out["mask"])


class Mae:
    """MAE pretraining on DeepSpeed."""

    scores: Tensor | None = None  # not learned, so there is nothing to watch

    def __init__(self, pretrain: TrainingLevel, *, schedule: MaskSchedule) -> None:
        self.pretrain = pretrain
        self.schedule = schedule

    @property
    def _loss(self) -> BaselineReconstruction:
        loss: BaselineReconstruction = self.pretrain.level.loss
        return loss

    @property
    def mask_frequency(self) -> Tensor:
        """How often each patch was hidden in the latest step, [N]."""
        return self._loss.mask.mean(dim=0)

    @property
    def num_keep(self) -> int | None:
        """Visible patches of an image in the next step."""
        return self.schedule.num_keep(self.pretrain.num_steps)

    def pretrain_step(self, micro_batches: list[Tensor]) -> None:
        """One step on images [B, C, H, W], as many micro-batches as the level accumulates."""
        self.pretrain.step(*self.schedule.batches(micro_batches, self.pretrain.num_steps))

    def picture_scorer(self) -> Scorer:
        """Scores images for a picture: the same on all ranks."""
        generator = torch.Generator(self.pretrain.engine.device).manual_seed(self.schedule.seed)
        assert self.num_keep is not None
        return self._loss.make_scorer(generator, self.num_keep)
