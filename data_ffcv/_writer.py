"""FFCV's writer, made to fail instead of hang.

FFCV's writer waits for ever when a worker dies. `write_beton` runs the same workers, watches them
and reports the first sample that could not be read.
"""

import ctypes
import sys
from collections.abc import Callable
from multiprocessing import Process, Queue, Value
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from PIL import Image

from data_ffcv._ffcv import DatasetWriter, IntField, MemoryAllocator, RGBImageField
from data_ffcv._sources import Source
from data_ffcv.errors import DataError

PAGE_BYTES = 8 << 20  # FFCV's default; a sample must fit into one page
_POLL_SECONDS = 0.1


class _Samples:
    """What FFCV's workers read: validated (pixels [H, W, 3] uint8, label) pairs."""

    def __init__(self, source: Source, min_side: int | None, seed: int, errors: Queue) -> None:
        self._source = source
        self._min_side = min_side
        self._seed = seed
        self._errors = errors

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            pixels = self._read(int(index))
        except Exception as error:
            self._errors.put(f"{self._source.name(int(index))} cannot be converted: {error}")
            sys.exit(1)  # a worker that raised would print a traceback beside the sentence
        # Write mode "proportion" draws from numpy's global generator: seeded here, its choice
        # does not depend on which worker meets the sample.
        np.random.seed((self._seed + int(index)) % 2**32)
        return pixels, int(self._source.labels[index])

    def _read(self, index: int) -> np.ndarray:
        image = self._source.image(index)
        scale = self._min_side / min(image.size) if self._min_side else 1.0
        if scale < 1:
            size = tuple(max(self._min_side, round(side * scale)) for side in image.size)
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = np.asarray(image)
        if pixels.nbytes > PAGE_BYTES:
            width, height = image.size
            raise ValueError(f"{width}x{height} pixels are too many; pass --min_side 512")
        return pixels


class _WatchedWriter(DatasetWriter):
    """`DatasetWriter` whose main loop notices failing samples and dead workers."""

    def __init__(
        self,
        path: Path,
        fields: dict[str, Any],
        num_workers: int,
        errors: Queue,
        on_progress: Callable[[int], None],
    ) -> None:
        super().__init__(str(path), fields, page_size=PAGE_BYTES, num_workers=num_workers)
        self._errors = errors
        self._on_progress = on_progress

    def _write_common(
        self, num_samples: int, queue_content: Any, work_fn: Callable, extra_worker_args: tuple
    ) -> None:
        """Replaces FFCV's loop; same workers, same file."""
        self.num_samples = num_samples
        self.prepare()
        chunks: Queue = Queue()
        for chunk in [*queue_content, *([None] * self.num_workers)]:
            chunks.put(chunk)
        allocations: Queue = Queue()
        done = Value(ctypes.c_uint64, 0)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        shared = (chunks, self.metadata_sm, self.metadata_type, self.fields, allocator, done)
        workers = [
            Process(target=work_fn, args=(*shared, allocations, *extra_worker_args), daemon=True)
            for _ in range(self.num_workers)
        ]
        try:
            for worker in workers:
                worker.start()
            self.finalize(self._watch(workers, done, allocations))
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
            chunks.cancel_join_thread()
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _watch(self, workers: list[Process], done: Any, allocations: Queue) -> list:
        """Waits until every worker has handed in its allocations; raises when one fails."""
        collected: list = []
        num_reports = 0
        while num_reports < len(workers):
            try:
                collected += allocations.get(timeout=_POLL_SECONDS)
                num_reports += 1
            except Empty:
                pass
            # In this order: what a worker reported before it died has arrived by then.
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if not self._errors.empty():
                raise DataError(self._errors.get())
            if dead:
                raise DataError(
                    f"a conversion worker died (exit code {dead[0]}); "
                    "check free disk and memory, or pass --num_workers 1"
                )
            self._on_progress(done.value)
        return collected


def write_beton(
    source: Source,
    path: Path,
    *,
    image_field: dict[str, Any],
    min_side: int | None,
    num_workers: int,
    seed: int,
    on_progress: Callable[[int], None],
) -> None:
    """Writes a source's samples in a seeded random order.

    Args:
        source: The images and labels.
        path: File to write.
        image_field: Keyword arguments of FFCV's RGBImageField.
        min_side: Shorter sides longer than this are shrunk to it; None keeps every size.
        num_workers: Writing processes.
        seed: Decides the order.
        on_progress: Called with the number of samples written so far.

    Raises:
        DataError: a sample cannot be read, or a worker died.
    """
    errors: Queue = Queue()
    fields = {"image": RGBImageField(**image_field), "label": IntField()}
    writer = _WatchedWriter(path, fields, num_workers, errors, on_progress)
    samples = _Samples(source, min_side, seed, errors)
    order = np.random.default_rng(seed).permutation(len(source.labels))
    writer.from_indexed_dataset(samples, indices=order, chunksize=100)
