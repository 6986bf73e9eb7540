"""Plain MAE: one level, random masks."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.engines import TrainingLevel
from mlomae.models import Scorer, random_scores, reconstruction_loss


class Mae:
    """MAE pretraining on DeepSpeed (He et al., arXiv 2111.06377).

    Masks are a function of (seed, step, rank, micro-batch), so resuming restores no generator.
    """

    def __init__(self, pretrain: TrainingLevel, seed: int) -> None:
        self.pretrain = pretrain
        self.seed = seed
        self.mask_frequency: Tensor | None = None  # [N], of the latest step
        self.scores: Tensor | None = None  # random, so there is nothing to watch

    def pretrain_step(self, micro_batches: list[Tensor], *, record: bool = False) -> None:
        """One step on the reconstruction loss of randomly hidden patches.

        Args:
            micro_batches: images [B, C, H, W], as many as the level accumulates.
            record: of no use here; no level lies above.
        """
        losses = []
        for i, images in enumerate(micro_batches):
            generator = torch.Generator(images.device)
            generator.manual_seed(hashed(self.seed, self.pretrain.num_steps, dist.get_rank(), i))
            out = self.pretrain(images, scorer=random_scores(generator))
            loss = reconstruction_loss(out["patch_loss"], out["mask"])
            self.pretrain.backward(loss, is_last=i == len(micro_batches) - 1)
            losses.append(loss.detach())
            self.mask_frequency = out["mask"].mean(dim=0)
        self.pretrain.step(torch.stack(losses).mean())

    def picture_scorer(self) -> Scorer:
        """Scores images for a picture: random, the same on all ranks."""
        device = self.pretrain.engine.device
        return random_scores(torch.Generator(device).manual_seed(self.seed))


def hashed(*parts: int) -> int:
    """A 63-bit seed from several numbers, far from the seed of any neighbour."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
