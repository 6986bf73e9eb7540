"""Batch norms whose statistics are those of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.distributed.collectives import sum_over_ranks, world_size
from mlomae.models.precision import at_least_float32


class GlobalBatchNorm(nn.Module):
    """Batch norm of [B, C] over the batches of all ranks, on any device.

    `torch.nn.SyncBatchNorm` runs on GPUs alone. Statistics are float32 or wider; names, momentum
    and eps are those of `torch.nn.BatchNorm1d`, which this is where there is one process, but that
    a batch which is not finite, whose step is skipped, does not spoil the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C]. While training all ranks must call, with batches of one size."""
        wide = at_least_float32(x)
        mean, variance = self._batch_statistics(wide) if self.training else self._running(wide)
        normed = (wide - mean) * (variance + self.eps).rsqrt()
        return (normed * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance; the running ones are moved towards them."""
        count = len(x) * world_size()
        mean = sum_over_ranks(x.sum(dim=0)) / count
        variance = sum_over_ranks((x - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            unbiased = variance * count / max(count - 1, 1)
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = running.lerp(new.to(running.dtype), self.momentum)
                running.copy_(torch.where(moved.isfinite(), moved, running))
            self.num_batches_tracked += 1
        return mean, variance

    def _running(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.running_mean.to(x.dtype), self.running_var.to(x.dtype)


class BatchNorm(GlobalBatchNorm):
    """Batch norm of [B, C, h, w] over the batches of all ranks, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same. While training all ranks must call, with one shape."""
        if self.training and world_size() > 1:
            rows = x.movedim(1, -1)
            normed = super().forward(rows.flatten(0, -2))
            return normed.unflatten(0, rows.shape[:-1]).movedim(-1, 1)
        wide = at_least_float32(x)
        if self.training:
            self.num_batches_tracked += 1
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (vector.to(wide.dtype) for vector in vectors)
        normed = F.batch_norm(
            wide, mean, variance, weight, bias, self.training, self.momentum, self.eps
        )
        return normed.to(x.dtype)
