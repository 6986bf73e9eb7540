"""The NNCLR head of MAE-CT, whose batch norms see the batch of all ranks."""

from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.models.precision import at_least_float32


class Embedded(TypedDict):
    """What the head makes of V views (a plain dict, so DeepSpeed's hooks can walk it)."""

    features: Tensor  # [V, B, D], detached: what the projector saw
    projections: Tensor  # [V, B, projection_dim]
    predictions: Tensor  # [V, B, projection_dim]


class NnclrHead(nn.Module):
    """Projector and predictor on pooled features of the encoder.

    Parameter names are those of the published MAE-CT head files. Each view passes by itself, so
    the statistics of the batch norms are those of one view over all ranks.

    Args:
        embed_dim: width of the encoder, D.
        projection_dim: width of projections and predictions.

    Source: Lehner et al., arXiv 2304.10520, after Dwibedi et al., arXiv 2104.14548.
    """

    def __init__(
        self,
        embed_dim: int,
        projector_hidden_dim: int = 2048,
        projection_dim: int = 256,
        predictor_hidden_dim: int = 4096,
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(embed_dim, projector_hidden_dim, bias=False),
            GlobalBatchNorm(projector_hidden_dim),
            nn.ReLU(),
            nn.Linear(projector_hidden_dim, projector_hidden_dim, bias=False),
            GlobalBatchNorm(projector_hidden_dim),
            nn.ReLU(),
            nn.Linear(projector_hidden_dim, projection_dim, bias=False),
            GlobalBatchNorm(projection_dim),
        )
        self.predictor = nn.Sequential(
            nn.Linear(projection_dim, predictor_hidden_dim, bias=False),
            GlobalBatchNorm(predictor_hidden_dim),
            nn.ReLU(),
            nn.Linear(predictor_hidden_dim, projection_dim, bias=False),
        )

    def forward(self, features: Tensor) -> Embedded:
        """Features [V, B, D] of V views. All ranks must call, with batches of one size."""
        features = features.to(self.projector[0].weight.dtype)
        projections = [self.projector(view) for view in features]
        return {
            "features": features.detach(),
            "projections": torch.stack(projections),
            "predictions": torch.stack([self.predictor(view) for view in projections]),
        }


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


# --- sums and gathers over ranks with gradients --------------------------------------------------
# Each rank differentiates its own loss. Summing what flows back makes the result the gradient of
# the sum of all ranks' losses, and averaging weight gradients that of their mean.


def world_size() -> int:
    """Number of ranks; one without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, differentiable. All ranks must call."""
    return tensor if world_size() == 1 else _SumOverRanks.apply(tensor)


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """[B, ...] -> [world_size * B, ...] of all ranks, differentiable. All ranks must call."""
    return tensor if world_size() == 1 else _GatherOverRanks.apply(tensor)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduced(grad)


class _GatherOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        whole = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduced(grad).chunk(world_size())[rank()]


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
