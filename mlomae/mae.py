"""Plain MAE: one level, random masks."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.engines import TrainingLevel
from mlomae.hypergrad.losses import Models
from mlomae.models import Scorer, random_scores, reconstruction_loss


class RandomReconstruction:
    """The mean loss of randomly hidden patches (He et al., arXiv 2111.06377).

    Masks are a function of (seed, rank, draw), so resuming restores no generator; the draws are
    counted by micro-batch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draw = 0
        self.mask: Tensor  # [B, N], of the latest micro-batch

    def __call__(self, models: Models, images: Tensor) -> Tensor:
        generator = torch.Generator(images.device)
        generator.manual_seed(hashed(self.seed, dist.get_rank(), self.draw))
        self.draw += 1
        out = models["pretrain"](images, scorer=random_scores(generator))
        self.mask = out["mask"]
        return reconstruction_loss(out["patch_loss"], out["mask"])


class Mae:
    """MAE pretraining on DeepSpeed."""

    scores: Tensor | None = None  # random, so there is nothing to watch

    def __init__(self, pretrain: TrainingLevel) -> None:
        self.pretrain = pretrain

    @property
    def _loss(self) -> RandomReconstruction:
        loss: RandomReconstruction = self.pretrain.level.loss
        return loss

    @property
    def mask_frequency(self) -> Tensor:
        """How often each patch was hidden in the latest step, [N]."""
        return self._loss.mask.mean(dim=0)

    def pretrain_step(self, micro_batches: list[Tensor]) -> None:
        """One step on images [B, C, H, W], as many micro-batches as the level accumulates."""
        self._loss.draw = self.pretrain.num_steps * len(micro_batches)
        self.pretrain.step(*micro_batches)

    def picture_scorer(self) -> Scorer:
        """Scores images for a picture: random, the same on all ranks."""
        device = self.pretrain.engine.device
        return random_scores(torch.Generator(device).manual_seed(self._loss.seed))


def hashed(*parts: int) -> int:
    """A 63-bit seed from several numbers, far from the seed of any neighbour."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
