"""Writes ``.beton`` files: threads read and encode samples, one thread writes them in order.

The bytes depend on the samples, the settings and the seed, never on the number of threads.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from data_ffcv.beton.layout import (
    ALLOCATION,
    FIELD,
    HEADER,
    LABELLED,
    LABELLED_FIELDS,
    MASKED,
    MASKED_FIELDS,
    METADATA_START,
    VERSION,
)
from data_ffcv.conversion.encoding import Encoded, Encoding
from data_ffcv.errors import DataError
from data_ffcv.sources import ImageSource

PAGE_SIZE = 8 << 20  # FFCV's default
_RUN = 32  # samples a thread takes at once: fewer, and threads mostly wait for one another


@dataclass
class Written:
    """What became of the samples.

    Attributes:
        num_samples: How many were written.
        image_size: "height" and "width", each [smallest, largest] in pixels.
        skipped: (name, reason) of those left out.
        changed: (name, what was done to it) of the odd images.
        notes: How many samples each thing was done to.
    """

    num_samples: int = 0
    image_size: dict[str, list[int]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    changed: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def write_beton(
    file: BinaryIO,
    source: ImageSource,
    indices: np.ndarray,
    encoding: Encoding,
    *,
    num_workers: int = 1,
    skip_errors: bool = False,
    on_sample: Callable[[], None] = lambda: None,
) -> Written:
    """Writes some samples of a source to an empty file, in the order of `indices`.

    Args:
        file: Opened for writing and reading; is complete and on the disk when this returns.
        source: The images.
        indices: Which samples.
        encoding: How they are stored.
        num_workers: Threads that read and encode.
        skip_errors: Leave samples out that cannot be read, instead of raising.
        on_sample: Called after each sample.

    Raises:
        DataError: a sample, or with `skip_errors` every sample, cannot be read.
        OSError: the file cannot be written.
    """
    labels = source.labels
    writer = PageWriter(file, len(indices), has_masks=labels is None)
    written = Written()
    for index, sample in _encode_all(source, indices, encoding, num_workers):
        if isinstance(sample, Exception):
            written.skipped.append((source.name(index), _reason(sample)))
            if not skip_errors:
                raise DataError(
                    "{} cannot be converted: {} (--on_error skip leaves such images out)".format(
                        *written.skipped[0]
                    )
                ) from sample
        else:
            writer.add(sample, 0 if labels is None else int(labels[index]))
            if sample.notes:
                written.changed.append((source.name(index), ", ".join(sample.notes)))
                written.notes.update(sample.notes)
        on_sample()
    written.num_samples = len(indices) - len(written.skipped)
    if written.num_samples == 0:
        raise DataError("none of the images can be read; {}: {}".format(*written.skipped[0]))
    written.image_size = writer.finish()
    return written


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _encode_all(
    source: ImageSource, indices: np.ndarray, encoding: Encoding, num_workers: int
) -> Iterator[tuple[int, Encoded | Exception]]:
    """Yields (index, sample or what went wrong) in order; few samples are in memory at once."""

    def encode(run: np.ndarray) -> list[tuple[int, Encoded | Exception]]:
        return [(index, _try_encode(source, index, encoding)) for index in run.tolist()]

    pending: deque[Future[list[tuple[int, Encoded | Exception]]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="convert")
    try:
        for start in range(0, len(indices), _RUN):
            pending.append(pool.submit(encode, indices[start : start + _RUN]))
            if len(pending) > num_workers + 1:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _try_encode(source: ImageSource, index: int, encoding: Encoding) -> Encoded | Exception:
    try:
        return encoding.encode(source.read(index), index)
    except MemoryError:
        raise  # says nothing about the sample
    except Exception as error:
        return error


class PageWriter:
    """Lays samples out as FFCV does: none crosses a page, and data begins behind the metadata.

    Space is reserved for the metadata of `max_samples`; if fewer come, a gap stays that no reader
    looks at.
    """

    def __init__(self, file: BinaryIO, max_samples: int, has_masks: bool) -> None:
        self._file = file
        self._has_masks = has_masks
        self._rows = np.zeros(max_samples, MASKED if has_masks else LABELLED)
        self._table = np.zeros((max_samples, 1 + has_masks), ALLOCATION)
        self._num_samples = 0
        self._page_size = PAGE_SIZE
        self._position = _align(METADATA_START + self._rows.nbytes, PAGE_SIZE)
        file.seek(self._position)

    def add(self, sample: Encoded, label: int) -> None:
        self._find_space(sample.num_bytes)
        row, regions = self._rows[self._num_samples], self._table[self._num_samples]
        row["image"] = (sample.mode, sample.width, sample.height, self._position)
        regions["sample_id"] = self._num_samples
        self._write(regions[0], sample.image)
        if sample.mask is not None:
            row["mask"] = (self._position, sample.mask.nbytes)
            self._write(regions[1], sample.mask)
        else:
            row["label"] = label
        self._num_samples += 1

    def _find_space(self, num_bytes: int) -> None:
        # A multiple of a larger power of two is one of the smaller: what is written stays valid.
        while num_bytes > self._page_size:
            self._page_size *= 2
        if self._position % self._page_size + num_bytes > self._page_size:
            self._position = _align(self._position, self._page_size)
            self._file.seek(self._position)

    def _write(self, region: np.void, content: np.ndarray) -> None:
        region["ptr"], region["size"] = self._position, content.nbytes
        self._file.write(content.data)
        self._position += content.nbytes

    def finish(self) -> dict[str, list[int]]:
        """Writes what surrounds the data, the header last: without it this is no ``.beton``.

        Returns:
            "height" and "width", each [smallest, largest].
        """
        rows = self._rows[: self._num_samples]
        table_start = _align(self._position, self._page_size)
        self._file.seek(table_start)
        self._file.write(self._table[: self._num_samples].tobytes())
        fields = np.zeros(2, FIELD)
        kinds = MASKED_FIELDS if self._has_masks else LABELLED_FIELDS
        fields["type_id"], fields["name"] = zip(*kinds, strict=True)
        self._file.seek(HEADER.itemsize)
        self._file.write(fields.tobytes() + rows.tobytes())
        self._sync()
        header = np.zeros((), HEADER)
        header[()] = (VERSION, 2, self._page_size, self._num_samples, table_start)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._sync()
        sides = {side: rows["image"][side] for side in ("height", "width")}
        return {side: [int(values.min()), int(values.max())] for side, values in sides.items()}

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _align(position: int, page_size: int) -> int:
    return -(-position // page_size) * page_size
