"""Batch norm whose statistics are those of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.distributed.collectives import sum_over_ranks, world_size
from mlomae.models.precision import at_least_float32


class BatchNorm(nn.Module):
    """Batch norm of [B, C] or [B, C, h, w] over the batches of all ranks, on any device.

    `torch.nn.SyncBatchNorm` runs on GPUs alone. Names, momentum and eps are those of PyTorch's
    `BatchNorm1d` and `BatchNorm2d`, which this is where there is one process, but that a batch
    which is not finite, whose step is skipped, does not spoil the running statistics.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the latest batch in the running statistics.
        affine: scale and shift each channel by trained values. Without them nothing is trained,
            and a batch that is not finite in one channel leaves the statistics of all alone.
        in_float64: sum batches in float64, else float32 or wider; rounded to float32, the result
            does not tell how many ranks summed them.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        affine: bool = True,
        in_float64: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.in_float64 = eps, momentum, in_float64
        for name, fill in (("weight", torch.ones), ("bias", torch.zeros)):
            vector = nn.Parameter(fill(num_features)) if affine else None
            self.register_parameter(name, vector)
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and precision. While training all ranks must call, with one shape."""
        wide = x.double() if self.in_float64 and self.training else at_least_float32(x)
        if not self.training:
            return self._by_torch(wide, self.running_mean, self.running_var).to(x.dtype)
        if x.ndim == 2:
            return self._over_ranks(wide).to(x.dtype)
        if world_size() == 1:
            return self._in_one_process(wide).to(x.dtype)
        rows = wide.movedim(1, -1)
        normed = self._over_ranks(rows.flatten(0, -2)).reshape(rows.shape)
        return normed.movedim(-1, 1).to(x.dtype)

    def _over_ranks(self, x: Tensor) -> Tensor:
        """[n, C] by the statistics of the rows of all ranks."""
        count = len(x) * world_size()
        mean = sum_over_ranks(x.sum(dim=0)) / count
        variance = sum_over_ranks((x - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            unbiased = variance * count / max(count - 1, 1)
            latest = ((self.running_mean, mean), (self.running_var, unbiased))
            self._track(*(running.lerp(new.to(running), self.momentum) for running, new in latest))
        normed = (x - mean) * (variance + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return normed
        return normed * self.weight.to(x.dtype) + self.bias.to(x.dtype)

    def _in_one_process(self, x: Tensor) -> Tensor:
        """[B, C, h, w] by PyTorch's kernel, which is faster."""
        mean, variance = (b.to(x.dtype, copy=True) for b in (self.running_mean, self.running_var))
        normed = self._by_torch(x, mean, variance)
        self._track(mean.to(self.running_mean.dtype), variance.to(self.running_var.dtype))
        return normed

    def _by_torch(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """PyTorch's batch norm; while training it moves both running statistics in place."""
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Take over running statistics [C], as far as they are finite."""
        is_finite = variance.isfinite()
        if self.weight is None:
            is_finite = is_finite.all()
        self.running_mean.copy_(torch.where(is_finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(is_finite, variance, self.running_var))
        self.num_batches_tracked += is_finite.any()
