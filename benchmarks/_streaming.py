"""Images per second of a contender's streams, measured in its process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _loaders import FFCV, Contender, open_loader

_NUM_AHEAD = 6  # batches, at most, that a contender has loaded before it is asked


class Load(NamedTuple):
    """How a contender is used."""

    num_streams: int
    num_workers: int
    batch_size: int


def images_per_second(contender: Contender, path: Path, load: Load, seconds: float) -> float:
    """Takes batches of all streams in turns, after those that had been loaded ahead."""
    streams = open_streams(contender, path, load)
    for stream in [*streams] * _NUM_AHEAD:
        next(stream)
    num_images, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        num_images += sum(len(next(stream)[0]) for stream in streams)
    if contender.library != FFCV:
        for stream in streams:
            stream.close()
    return num_images / elapsed


_kept: list[Iterator[Any]] = []


def open_streams(contender: Contender, path: Path, load: Load) -> list[Iterator[Any]]:
    """FFCV's own are kept open for the next call: each compiles for ten seconds and more."""

    def open_one(number: int) -> Iterator[Any]:
        return open_loader(contender, path, number, load.num_workers, load.batch_size)

    if contender.library != FFCV:
        return [open_one(number) for number in range(load.num_streams)]
    while len(_kept) < load.num_streams:
        _kept.append(open_one(len(_kept)))
    return _kept[: load.num_streams]
