"""What decides the masks of a micro-batch besides the scores: share, noise, weighting."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mlomae.distributed.collectives import rank
from mlomae.models.mae import num_kept
from mlomae.models.precision import at_least_float32
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.randomness import derive_seed

Weighting = Literal["published", "normalized"]


class MaskedBatch(NamedTuple):
    """A micro-batch of the pretrain level.

    The loss is a function of it and of the weights alone, so a derivative that runs it once more
    meets the same masks.
    """

    images: Tensor  # [B, C, H, W]
    num_keep: int  # visible patches
    temperature: float = 0.0  # of the Gumbel noise on the scores; 0 hides the highest scores
    seed: int = 0  # of the noise

    def generator(self) -> torch.Generator:
        """A new generator on the images' device, at the start of this batch's noise."""
        return torch.Generator(self.images.device).manual_seed(self.seed)


@dataclass(frozen=True)
class MaskSchedule:
    """Mask ratio and temperature over the steps of the pretrain level, each linear.

    Masks are a function of (seed, rank, draw), so resuming restores no generator.

    Attributes:
        mask_ratio, temperature: at the first and at the last step.
        num_patches: patches of an image.
        num_steps: optimizer steps of the whole run.
    """

    num_patches: int
    mask_ratio: tuple[float, float] = (0.75, 0.75)
    temperature: tuple[float, float] = (0.0, 0.0)
    num_steps: int = 1
    seed: int = 0

    @classmethod
    def of(cls, recipe: PretrainingRecipe, num_steps: int) -> "MaskSchedule":
        """The schedule of a recipe."""
        masking = recipe.masking
        end = masking.mask_ratio if masking.mask_ratio_end is None else masking.mask_ratio_end
        noise = masking.temperature if masking.selection == "gumbel_top_k" else 0.0
        coldest = noise if masking.temperature_end is None else masking.temperature_end
        return cls(
            recipe.model.num_patches,
            (masking.mask_ratio, end),
            (noise, coldest),
            num_steps,
            recipe.seed,
        )

    def num_keep(self, step: int) -> int:
        """Visible patches of an image in a step."""
        return num_kept(self.num_patches, self._at(step, self.mask_ratio))

    def batches(self, micro_batches: list[Tensor], step: int) -> list[MaskedBatch]:
        """The images [B, C, H, W] of one step, with what decides their masks."""
        first = step * len(micro_batches)
        return [
            MaskedBatch(
                images,
                self.num_keep(step),
                self._at(step, self.temperature),
                derive_seed(self.seed, rank(), first + i),
            )
            for i, images in enumerate(micro_batches)
        ]

    def _at(self, step: int, ends: tuple[float, float]) -> float:
        progress = min(1.0, step / max(1, self.num_steps - 1))
        return ends[0] + (ends[1] - ends[0]) * progress


def loss_weights(scores: Tensor, mask: Tensor, weighting: Weighting) -> Tensor:
    """Weight of each patch's loss in the batch's, float32 or wider [B, N]; 0 where it was visible.

    `published` divides the scores of hidden patches by the number of hidden patches (equation 1 of
    arXiv 2402.18128, as its code averages it): smaller scores make a smaller loss. `normalized`
    divides by their sum, so a uniform shrink of the scores changes nothing.
    """
    hidden = at_least_float32(scores) * mask
    return hidden / (mask if weighting == "published" else hidden).sum()
