"""What streams take in memory and threads, measured in a contender's process.

Memory is what belongs to the process alone (RssAnon and RssShmem): pages of a mapped file are the
system's page cache, which all streams and processes share.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _loaders import FFCV, MEAN, STD, Contender, build_ffcv_loader, open_loader
from _measure import _status
from _streaming import Load

_SECONDS_TO_SETTLE = 0.5  # for what is loaded ahead
GROWTH_EPOCHS = (5, 50)


class Opened(NamedTuple):
    """After one more stream was opened: how long that took, and megabytes added so far."""

    seconds: float
    first_batch_seconds: float
    megabytes: float


def open_one_by_one(contender: Contender, path: Path, load: Load) -> list[Opened]:
    """Opens streams, draws a batch of each, and keeps them."""
    _import(contender)
    before, streams, found = _own_megabytes(), [], []
    for number in range(load.num_streams):
        start = time.perf_counter()
        stream = _open(contender, path, number, load)
        opened = time.perf_counter()
        next(stream)
        streams.append(stream)
        drawn = time.perf_counter()
        time.sleep(_SECONDS_TO_SETTLE)
        found.append(Opened(opened - start, drawn - opened, _own_megabytes() - before))
    return found


def _open(contender: Contender, path: Path, number: int, load: Load) -> Iterator[Any]:
    if contender.library == FFCV:  # its epochs as they are: longer ones would take memory
        return iter(build_ffcv_loader(contender, path, number, load.num_workers, load.batch_size))
    return open_loader(contender, path, number, load.num_workers, load.batch_size)


def _import(contender: Contender) -> None:
    """Loads what every stream needs, so that it does not count as the first one's."""
    if contender.library == FFCV:
        import ffcv.loader
        import ffcv.transforms  # noqa: F401
    else:
        import data_ffcv.pixels.decoder
        import data_ffcv.streams.ffcv_backend
        import data_ffcv.streams.loader  # noqa: F401


class Growth(NamedTuple):
    """Of a process after so many epochs."""

    num_epochs: int
    megabytes: float
    num_threads: int


def grow(contender: Contender, path: Path, load: Load) -> list[Growth]:
    """Trains and leaves an evaluation after its first batch, over and over."""
    train, evaluate = _epochs_of(contender, path, load)
    found = []
    for epoch in range(1, GROWTH_EPOCHS[-1] + 1):
        train()
        evaluate()
        if epoch in GROWTH_EPOCHS:
            found.append(Growth(epoch, _own_megabytes(), _num_threads()))
    return found


def _epochs_of(
    contender: Contender, path: Path, load: Load
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns what trains for an epoch, and what begins an evaluation and leaves it."""
    if contender.library == FFCV:
        loader = build_ffcv_loader(contender, path, 0, load.num_workers, load.batch_size)
        return lambda: [None for _ in loader], lambda: next(iter(loader))
    from data_ffcv import Augmentation, open_eval_loader

    stream = open_loader(contender, path, 0, load.num_workers, load.batch_size)
    loader = open_eval_loader(
        path,
        augmentation=Augmentation("center_crop", contender.image_size),
        batch_size=load.batch_size,
        mean=MEAN,
        std=STD,
        num_workers=load.num_workers,
        backend=stream.backend,
    )
    epoch = range(loader.info.num_samples // load.batch_size)
    return lambda: [None for _ in epoch if next(stream)], lambda: next(iter(loader))


def _own_megabytes() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("RssAnon") + _status("RssShmem")


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
