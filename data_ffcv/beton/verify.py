"""Finding damage in a ``.beton``: checksums, structure, JPEG data and mask values."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.info import BetonInfo, inspect_beton, side_path
from data_ffcv.beton.layout import IGNORED, JPG, read_layout
from data_ffcv.errors import DataError

_BLOCK = 1 << 23  # bytes read at once
_CHUNK = 64  # samples that one thread takes at once
_MAX_RANGES = 12  # runs of samples that a finding spells out

Progress = Callable[[str, int, int], None]  # called with (what is done, how much, of how much)


class Finding(NamedTuple):
    """Something wrong with a file.

    Attributes:
        problem: What is wrong, one sentence.
        samples: Indices of the samples that are or may be damaged; empty if none can be named.
    """

    problem: str
    samples: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.samples:
            return self.problem
        word = "sample" if len(self.samples) == 1 else f"{len(self.samples)} samples"
        return f"{self.problem}: {word} {_format_ranges(self.samples)}"


class _Piece(NamedTuple):
    """A part of the file that has a checksum of its own."""

    name: str
    start: int
    end: int
    checksum: int


def verify(
    path: str | Path, on_progress: Progress = lambda what, done, total: None
) -> list[Finding]:
    """Reads a whole ``.beton`` and returns what is wrong with it; nothing when it is sound.

    Compares the bytes with the checksums of the side file, decodes every JPEG and looks at every
    mask. `find_gaps` says what cannot be checked.

    Raises:
        DataError: the file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the path of a .beton file")
    try:
        info = inspect_beton(path)
        findings = []
    except DataError as error:
        info = None
        findings = [Finding(str(error))]
    try:
        findings += _check_bytes(path, info, on_progress)
    except OSError as error:
        return [*findings, Finding(f"{path} cannot be read to its end ({error.strerror})")]
    return findings + (_check_samples(info, on_progress) if info else [])


def find_gaps(path: str | Path) -> str | None:
    """Returns a sentence about what `verify` cannot check for want of checksums, or None."""
    side = side_path(path)
    content = _read_side(path)
    if "checksums" in content:
        return None
    lacking = f"{side} holds no checksums" if side.is_file() else f"{side} is missing"
    if "sha256" in content:
        return f"{lacking}, only one of the whole file, so damage cannot be located"
    return (
        f"{lacking}, so changed bits in labels, raw images and masks go unnoticed and only the "
        "tables and the JPEG data are checked; put the file back that was converted with this one"
    )


def _read_side(path: str | Path) -> dict[str, Any]:
    """Returns what the side file says, nothing when there is none that can be read."""
    try:
        content = json.loads(side_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_bytes(path: Path, info: BetonInfo | None, on_progress: Progress) -> list[Finding]:
    """Compares the CRC32 of each part and the SHA-256 of the whole in one pass."""
    side = _read_side(path)
    if "sha256" not in side and "checksums" not in side:
        return []
    try:
        pieces = list(_cut(path, side))
    except DataError:
        return []  # the header is damaged, which `verify` has reported
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return [Finding(f"the checksums of {side_path(path)} do not fit this file")]
    whole, findings = hashlib.sha256(), []
    for piece, checksum in _hash_pieces(path, pieces, whole, on_progress):
        if checksum != piece.checksum and "checksums" in side:
            problem = f"{piece.name} (bytes {piece.start} to {piece.end}) has changed"
            findings.append(Finding(problem, _find_samples(info, piece)))
    if not findings and "sha256" in side and whole.hexdigest() != side["sha256"]:
        findings.append(Finding(f"the SHA-256 of {path} is not that of its side file"))
    return findings


def _cut(path: Path, side: dict[str, Any]) -> Iterator[_Piece]:
    """Yields the parts of the file, in order and without a gap."""
    size, layout = path.stat().st_size, read_layout(path)
    if "checksums" not in side:
        yield _Piece("the file", 0, size, 0)
        return
    checksums, page_size = side["checksums"], int(side["page_size"])
    pages, end = checksums["pages"], layout.table_start
    # Counted from the end: space for samples that were skipped may lie before the first page.
    start = (-(-end // page_size) - len(pages)) * page_size
    if start < layout.metadata_end:
        raise ValueError("more pages than fit into the file")
    yield _Piece("the header or metadata", 0, start, int(checksums["metadata"]))
    for number, checksum in enumerate(pages):
        first = start + number * page_size
        yield _Piece(f"page {number}", first, min(first + page_size, end), int(checksum))
    yield _Piece("the allocation table", end, size, int(checksums["table"]))


def _hash_pieces(
    path: Path, pieces: list[_Piece], whole: Any, on_progress: Progress
) -> Iterator[tuple[_Piece, int]]:
    """Yields each part with its CRC32, and feeds all bytes to the hash `whole`."""
    with path.open("rb") as file:
        for piece in pieces:
            checksum = 0
            for start in range(piece.start, piece.end, _BLOCK):
                block = file.read(min(_BLOCK, piece.end - start))
                checksum = zlib.crc32(block, checksum)
                whole.update(block)
                on_progress("bytes", start + len(block), pieces[-1].end)
            yield piece, checksum


def _find_samples(info: BetonInfo | None, piece: _Piece) -> tuple[int, ...]:
    """Returns the samples of which an image or a mask lies in a part of the file."""
    if info is None:
        return ()
    samples = info.samples
    hit = _overlaps(samples.pointers, samples.num_bytes, piece)
    if samples.mask_pointers is not None:
        sizes = samples.heights.astype(np.int64) * samples.widths
        hit |= _overlaps(samples.mask_pointers, sizes, piece)
    return tuple(np.flatnonzero(hit).tolist())


def _overlaps(starts: np.ndarray, sizes: np.ndarray, piece: _Piece) -> np.ndarray:
    overlaps: np.ndarray = (starts < piece.end) & (starts + sizes > piece.start)
    return overlaps


def _check_samples(info: BetonInfo, on_progress: Progress) -> list[Finding]:
    """Decodes every JPEG and looks at every mask, in as many threads as there are cores."""
    images = BetonImages(info)

    def check(chunk: np.ndarray) -> list[Finding]:
        return [finding for index in chunk for finding in _check_sample(info, images, int(index))]

    findings, done = [], 0
    looked_at = np.arange(info.num_samples)
    if not info.has_masks:
        looked_at = np.flatnonzero(info.samples.modes == JPG)
    chunks = [looked_at[i : i + _CHUNK] for i in range(0, len(looked_at), _CHUNK)]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for chunk, of_chunk in zip(chunks, pool.map(check, chunks), strict=True):
            findings += of_chunk
            done += len(chunk)
            on_progress("images", done, len(looked_at))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    return findings


def _check_sample(info: BetonInfo, images: BetonImages, index: int) -> Iterator[Finding]:
    if info.samples.modes[index] == JPG:
        try:
            images.decode(index)
        except DataError as error:
            yield Finding(str(error), (index,))
    if info.has_masks:
        mask = read_mask(info, images, index)
        wrong = mask[(mask >= info.num_classes) & (mask != IGNORED)]
        if len(wrong):
            problem = f"a mask holds class {wrong.max()}, there are {info.num_classes} classes"
            yield Finding(problem, (index,))


def read_mask(info: BetonInfo, images: BetonImages, index: int) -> np.ndarray:
    """Returns a view of one mask, uint8 [height, width]."""
    pointers = info.samples.mask_pointers
    assert pointers is not None  # the caller has asked `info.has_masks`
    height, width = int(info.samples.heights[index]), int(info.samples.widths[index])
    start = int(pointers[index])
    return images.masks[start : start + height * width].reshape(height, width)


def _format_ranges(numbers: tuple[int, ...]) -> str:
    """Writes rising numbers shortly: ``3, 7-9``."""
    runs = np.split(np.array(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts[:_MAX_RANGES]) + (", ..." if len(texts) > _MAX_RANGES else "")
