"""What features go through before a classifier or a clustering sees them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.frozen.store import Features

_STANDARDIZE_EPS = 1e-5  # added to the deviation, as MAE-CT does


@dataclass(frozen=True)
class Standardizer:
    """Subtracts a mean and divides by a deviation, of each dimension.

    Attributes:
        mean, std: [D]; std is the unbiased deviation plus 1e-5.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Features, device: str | torch.device) -> "Standardizer":
        """Mean and deviation of all rows, summed in float64 in two passes over the parts."""
        total = squares = torch.zeros((), dtype=torch.float64, device=device)
        for part in features.parts(device):
            total = total + part.double().sum(dim=0)
        mean = total / len(features)
        for part in features.parts(device):
            squares = squares + (part.double() - mean).square().sum(dim=0)
        std = (squares / max(1, len(features) - 1)).sqrt() + _STANDARDIZE_EPS
        return cls(mean.float(), std.float())

    def __call__(self, features: Tensor) -> Tensor:
        """Standardise [n, D]."""
        return (features - self.mean) / self.std


def centre_rows(features: Tensor) -> Tensor:
    """Each row [D] without its mean, L2-normalised: MSN's step before its regression."""
    return F.normalize(features - features.mean(dim=1, keepdim=True), dim=1)
