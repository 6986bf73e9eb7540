"""The processes of one evaluation: one that Python started, or several of a launcher."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from rich.progress import track

from mlomae.distributed.collectives import rank

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


def tracked(work: Iterable[T], title: str) -> Iterable[T]:
    """The same items; the first rank shows how far it is."""
    return track(work, title, disable=rank() != 0, transient=True)
