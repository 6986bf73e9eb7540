"""Collective operations: rank, sums, gathers, agreement."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; one without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, differentiable. All ranks must call."""
    if world_size() == 1:
        return tensor
    total: Tensor = _SumOverRanks.apply(tensor)  # type: ignore[no-untyped-call]
    return total


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """[B, ...] -> [world_size * B, ...] of all ranks, differentiable. All ranks must call."""
    if world_size() == 1:
        return tensor
    whole: Tensor = _GatherOverRanks.apply(tensor)  # type: ignore[no-untyped-call]
    return whole


# Each rank differentiates its own loss. Summing what flows back makes the result the gradient of
# the sum of all ranks' losses, and averaging weight gradients that of their mean.


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


def sum_in_float64(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, float64 on the CPU. All ranks must call."""
    values = values.double()
    if dist.is_initialized():
        values = values.to(_device())
        dist.all_reduce(values)
    return values.cpu()


def all_agree(condition: bool) -> bool:
    """Whether the condition holds on every rank. All ranks must call."""
    if not dist.is_initialized():
        return condition
    flag = torch.tensor(int(condition), device=_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def barrier() -> None:
    """Wait for all ranks. All ranks must call."""
    if dist.is_initialized():
        dist.barrier()


def _device() -> torch.device:
    """Where the process group takes its tensors from."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else "cuda")


def gather_objects(value: T) -> list[T]:
    """The value of every rank, by rank. All ranks must call.

    Where a rank fails alone, gather what failed before any raises: one that raised at once would
    leave the others waiting in their next collective call.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_problem(problem: str | None) -> tuple[int, str] | None:
    """The first rank that has a problem, and the problem. All ranks must call."""
    problems = gather_objects(problem)
    return next(((rank, text) for rank, text in enumerate(problems) if text is not None), None)


def from_first_rank(value: T) -> T:
    """The first rank's value, on all ranks. All ranks must call."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
