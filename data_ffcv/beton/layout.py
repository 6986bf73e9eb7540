"""The layout of ``.beton`` files: header, fields, metadata rows, pages of data, table of regions.

FFCV 1.0.2's format, version 2 (ffcv/types.py, ffcv/fields), with the two kinds of file that we
write: image and label, or image and mask.
"""

import hashlib
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_ffcv.errors import DataError

JPG, RAW = 0, 1
IGNORED = 255  # class index of mask pixels that count nowhere
VERSION = 2
CONVERT = "convert it again with python -m data_ffcv.convert"
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1 << 16, 1 << 20  # bound the temporary memory

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
LABELLED = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
MASKED = np.dtype([("image", _IMAGE), ("mask", _BYTES)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
LABELLED_FIELDS = ((2, b"image"), (1, b"label"))  # (type, name): RGBImage and Int
MASKED_FIELDS = ((2, b"image"), (3, b"mask"))  # RGBImage and Bytes
METADATA_START = HEADER.itemsize + 2 * FIELD.itemsize


class Layout(NamedTuple):
    """What the header says: the file's parts in bytes.

    Attributes:
        num_samples: Number of samples.
        has_masks: Whether the second field is a mask, not a label.
        page_size: No sample crosses a multiple of it.
        metadata_end: Where the rows of the samples end.
        table_start: Where the pages end and the allocation table begins.
    """

    num_samples: int
    has_masks: bool
    page_size: int
    metadata_end: int
    table_start: int

    @property
    def data_start(self) -> int:
        """The first page boundary at or behind the metadata."""
        return -(-self.metadata_end // self.page_size) * self.page_size


def read_layout(path: str | Path) -> Layout:
    """Reads and checks the header alone.

    Raises:
        DataError: as `inspect_beton`.
    """
    with open_beton(Path(path)) as file:
        return read_header(Path(path), file)


def open_beton(path: Path) -> BinaryIO:
    """Opens a file for reading; raises DataError where that fails."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; create it with python -m data_ffcv.convert"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened ({error.strerror}); give a readable .beton file"
        ) from error


def read_header(path: Path, file: BinaryIO) -> Layout:
    """Reads header and fields, and checks that the file has the length which they imply."""
    size = file.seek(0, 2)
    if size == 0:
        raise DataError(f"{path} is empty; {CONVERT}")
    file.seek(0)
    header = np.frombuffer(_read(path, file, HEADER.itemsize), HEADER)[0]
    if header["version"] != VERSION:
        raise DataError(f"{path} is not a .beton file of version {VERSION}; {CONVERT}")
    has_masks = _read_fields(path, file, int(header["num_fields"]))
    if header["alloc_table_ptr"] == 0:
        raise DataError(f"{path} is unfinished, its writer was stopped; {CONVERT}")
    if header["num_samples"] == 0:
        raise DataError(f"{path} holds no sample; {CONVERT}")
    page_size = int(header["page_size"])
    if page_size & (page_size - 1) or page_size == 0:
        raise contradiction(path, f"its page size is {page_size}, not a power of two")
    num_samples, table_start = int(header["num_samples"]), int(header["alloc_table_ptr"])
    metadata_end = METADATA_START + num_samples * (MASKED if has_masks else LABELLED).itemsize
    end = table_start + num_samples * (1 + has_masks) * ALLOCATION.itemsize
    if size < end:
        raise DataError(f"{path} is truncated, {size} bytes instead of {end}; {CONVERT}")
    if size > end or metadata_end > table_start:
        raise contradiction(path, f"{num_samples} samples do not fill its {size} bytes")
    return Layout(num_samples, has_masks, page_size, metadata_end, table_start)


def _read_fields(path: Path, file: BinaryIO, num_fields: int) -> bool:
    """Returns whether the fields are those of a segmentation file."""
    fields: tuple[tuple[int, bytes], ...] = ()
    if num_fields == 2:
        rows = np.frombuffer(_read(path, file, 2 * FIELD.itemsize), FIELD)
        fields = tuple((int(row["type_id"]), bytes(row["name"])) for row in rows)
    if fields not in (LABELLED_FIELDS, MASKED_FIELDS):
        names = ", ".join(f"{name.decode(errors='replace')} (type {kind})" for kind, name in fields)
        raise DataError(
            f"{path} has the wrong fields, {names or num_fields}, instead of an RGB image and an "
            f"integer label, or an RGB image and a mask of bytes; {CONVERT}"
        )
    return fields == MASKED_FIELDS


def _read(path: Path, file: BinaryIO, num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise DataError(f"{path} is truncated within its header or tables; {CONVERT}")
    return content


def read_rows(
    path: Path, file: BinaryIO, dtype: np.dtype, count: int, start: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (which rows, rows) for `count` rows at position `start`."""
    file.seek(start)
    for first in range(0, count, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, count)
        content = _read(path, file, (last - first) * dtype.itemsize)
        yield slice(first, last), np.frombuffer(content, dtype)


def contradiction(path: Path, what: str) -> DataError:
    """Returns the error about a file of which two parts cannot both be true."""
    return DataError(f"{path} is damaged, its parts contradict each other ({what}); {CONVERT}")


def compute_checksums(file: BinaryIO, layout: Layout) -> tuple[str, dict[str, int | list[int]]]:
    """Reads a whole file once.

    Returns:
        Its SHA-256 in hexadecimal, and CRC32s (ISO 3309): "metadata" of all before `data_start`,
        "pages" of each page from there on, "table" of the allocation table.
    """
    end = file.seek(0, 2)
    pages = range(layout.data_start, layout.table_start, layout.page_size)
    file.seek(0)
    digest, checksums = hashlib.sha256(), []
    for start, stop in pairwise([0, *pages, layout.table_start, end]):
        checksum = 0
        for position in range(start, stop, _BYTES_AT_ONCE):
            block = file.read(min(_BYTES_AT_ONCE, stop - position))
            digest.update(block)
            checksum = zlib.crc32(block, checksum)
        checksums.append(checksum)
    metadata, *of_pages, table = checksums
    return digest.hexdigest(), {"metadata": metadata, "pages": of_pages, "table": table}
