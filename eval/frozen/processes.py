"""The processes of one evaluation: one that Python started, or several of a launcher."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from mlomae.distributed.collectives import rank, world_size

T = TypeVar("T")


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) has started this process."""
    return "RANK" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of a launcher form a group; a process started alone needs none."""
    if not is_launched() or dist.is_initialized():
        yield
        return
    from mlomae.distributed.start import start_ranks  # late: it loads DeepSpeed

    start_ranks()
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks. All ranks must call."""
    if dist.is_initialized():
        dist.barrier()


def sum_in_float64(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, float64 on the CPU. All ranks must call."""
    values = values.double()
    if dist.is_initialized():
        on_cpu = dist.get_backend() == "gloo"
        values = values.cpu() if on_cpu else values.cuda()
        dist.all_reduce(values)
    return values.cpu()


def all_agree(here: bool) -> bool:
    """Whether something holds on every rank. All ranks must call."""
    return int(sum_in_float64(torch.tensor(float(here)))) == world_size()


def tracked(work: Iterable[T], title: str) -> Iterable[T]:
    """The same items; the first rank shows how far it is."""
    return track(work, title, disable=rank() != 0, transient=True)
