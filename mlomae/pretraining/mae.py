"""The loss of plain MAE, with masks that nothing learns."""

from collections.abc import Callable

import torch
from torch import Tensor

from mlomae.hypergrad.losses import Models
from mlomae.models import Scorer, block_scores, random_scores, reconstruction_loss
from mlomae.pretraining.masks import MaskedBatch
from mlomae.pretraining.recipe import PretrainingRecipe

MakeScorer = Callable[[torch.Generator, int], Scorer]
"""From a generator and the number of visible patches to the scores of a batch."""


def baseline_scorer(recipe: PretrainingRecipe) -> MakeScorer:
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
        scorer = self.make_scorer(batch.generator(), batch.num_keep)
        out = models["pretrain"](batch.images, scorer=scorer, num_keep=batch.num_keep)
        self.mask = out["mask"]
        return reconstruction_loss(out["patch_loss"], out["mask"])
