"""What a ``.beton`` file holds, read and checked without FFCV.

FFCV trusts its files: a truncated one can crash the process, and one whose writer was killed
hangs the loader. `inspect_beton` therefore checks the structure first.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_ffcv.beton.layout import (
    ALLOCATION,
    CONVERT,
    JPG,
    LABELLED,
    MASKED,
    METADATA_START,
    RAW,
    Layout,
    contradiction,
    open_beton,
    read_header,
    read_rows,
)
from data_ffcv.errors import DataError

_MAX_CLASSES = 1 << 20  # more are a damaged label


@dataclass(frozen=True, eq=False)
class Samples:
    """Where each sample lies in the file; arrays [num_samples].

    Attributes:
        pointers: Position of the image's first byte, int64.
        num_bytes: Stored size of the image, int64.
        modes: `JPG` or `RAW`, uint8.
        heights: Pixels, uint16; likewise `widths`.
        mask_pointers: Position of the mask's height * width bytes, int64; None without masks.
    """

    pointers: np.ndarray
    num_bytes: np.ndarray
    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    mask_pointers: np.ndarray | None


@dataclass(frozen=True, eq=False)
class BetonInfo:
    """What a checked file holds.

    Attributes:
        path: The file.
        num_samples: Number of images.
        num_classes: Number of classes; labels are in [0, num_classes).
        classes: Name of each class; the numbers as text when the file has no side file.
        labels: Class of each sample, int64 [num_samples]; None for a segmentation file.
        samples: Where each sample lies.
        min_height: Smallest image height, in pixels; likewise the other three.
        version: `file_version` of the file that was read.
    """

    path: Path
    num_samples: int
    num_classes: int
    classes: tuple[str, ...]
    labels: np.ndarray | None
    samples: Samples
    min_height: int
    max_height: int
    min_width: int
    max_width: int
    version: tuple[int, ...] = ()

    @property
    def has_masks(self) -> bool:
        """Whether the file is for segmentation: a mask instead of a label."""
        return self.labels is None


def side_path(path: str | Path) -> Path:
    """Path of the JSON file that stands beside a ``.beton`` and names its classes."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def file_version(status: os.stat_result) -> tuple[int, ...]:
    """Returns what tells a file from another, and from itself after a change."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def inspect_beton(path: str | Path) -> BetonInfo:
    """Checks that a file is complete and describes it.

    Reads metadata and allocation table, not the images.

    Raises:
        DataError: the file is missing, empty, truncated, unfinished, of another kind, or
            contradicts itself or its side file.
    """
    path = Path(path)
    with open_beton(path) as file:
        try:
            layout = read_header(path, file)
            samples, labels = _read_samples(path, file, layout)
            version = file_version(os.fstat(file.fileno()))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check the disk") from error
    classes = _read_classes(path, layout, labels)
    return BetonInfo(
        path=path,
        num_samples=layout.num_samples,
        num_classes=len(classes),
        classes=classes,
        labels=labels,
        samples=samples,
        min_height=int(samples.heights.min()),
        max_height=int(samples.heights.max()),
        min_width=int(samples.widths.min()),
        max_width=int(samples.widths.max()),
        version=version,
    )


def _read_samples(path: Path, file: BinaryIO, layout: Layout) -> tuple[Samples, np.ndarray | None]:
    """Returns (samples, labels) after checking everything that FFCV takes on trust."""
    count = layout.num_samples
    labels = None if layout.has_masks else np.empty(count, np.int64)
    mask_pointers = np.empty(count, np.int64) if layout.has_masks else None
    samples = Samples(
        pointers=np.empty(count, np.int64),
        num_bytes=np.zeros(count, np.int64),
        modes=np.empty(count, np.uint8),
        heights=np.empty(count, np.uint16),
        widths=np.empty(count, np.uint16),
        mask_pointers=mask_pointers,
    )
    dtype = MASKED if layout.has_masks else LABELLED
    for which, rows in read_rows(path, file, dtype, count, METADATA_START):
        samples.pointers[which] = rows["image"]["data_ptr"]
        samples.modes[which] = rows["image"]["mode"]
        samples.heights[which] = rows["image"]["height"]
        samples.widths[which] = rows["image"]["width"]
        if mask_pointers is not None:
            mask_pointers[which] = rows["mask"]["ptr"]
            _check_mask_sizes(path, rows)
        if labels is not None:
            labels[which] = rows["label"]
    _check_values(path, samples, labels)
    _read_table(path, file, layout, samples)
    return samples, labels


def _check_mask_sizes(path: Path, rows: np.ndarray) -> None:
    image = rows["image"]
    if (rows["mask"]["size"] != image["height"].astype(np.uint64) * image["width"]).any():
        raise contradiction(path, "a mask is not of the size of its image")


def _check_values(path: Path, samples: Samples, labels: np.ndarray | None) -> None:
    if samples.heights.min() == 0 or samples.widths.min() == 0:
        raise contradiction(path, "an image has no pixel")
    if samples.modes.max() > max(JPG, RAW):
        raise contradiction(path, "an image is neither JPEG nor raw")
    if labels is not None and labels.min() < 0:
        raise DataError(f"{path} holds a negative label, {labels.min()}; {CONVERT}")


def _read_table(path: Path, file: BinaryIO, layout: Layout, samples: Samples) -> None:
    """Fills `num_bytes` in: each image and each mask must be one allocated region."""
    num_rows = layout.num_samples * (1 + layout.has_masks)
    mask_seen = np.zeros(layout.num_samples if layout.has_masks else 0, bool)
    for _, rows in read_rows(path, file, ALLOCATION, num_rows, layout.table_start):
        if rows["sample_id"].max() >= layout.num_samples:
            raise contradiction(path, "its table names a sample that does not exist")
        sample, start = rows["sample_id"].astype(np.intp), rows["ptr"].astype(np.int64)
        size = rows["size"].astype(np.int64)
        _check_regions(path, layout, start, size)
        pixels = samples.heights[sample].astype(np.int64) * samples.widths[sample]
        is_image = start == samples.pointers[sample]
        of_image = sample[is_image]
        samples.num_bytes[of_image] = size[is_image]
        raw = samples.modes[of_image] == RAW
        sound = (size[is_image][raw] == 3 * pixels[is_image][raw]).all()
        if samples.mask_pointers is not None:
            is_mask = start == samples.mask_pointers[sample]
            mask_seen[sample[is_mask]] = True
            sound &= (is_image != is_mask).all() and (size[is_mask] == pixels[is_mask]).all()
        if not sound or not (layout.has_masks or is_image.all()):
            raise contradiction(path, "its table and its metadata differ")
    if samples.num_bytes.min() == 0 or not mask_seen.all():
        raise contradiction(path, "its table leaves a sample out")


def _check_regions(path: Path, layout: Layout, start: np.ndarray, size: np.ndarray) -> None:
    """Every region must lie behind the metadata and before the table."""
    inside = (start >= layout.metadata_end) & (size > 0) & (size <= layout.table_start)
    if not (inside & (start <= layout.table_start - size)).all():
        raise contradiction(path, "a sample points outside the data")


def _read_classes(path: Path, layout: Layout, labels: np.ndarray | None) -> tuple[str, ...]:
    side = side_path(path)
    if not side.is_file():
        if labels is None:
            raise DataError(f"{side} is missing, which names the classes of the masks; {CONVERT}")
        if labels.max() >= _MAX_CLASSES:
            raise contradiction(path, f"a sample has the label {labels.max()}")
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    try:
        content = json.loads(side.read_text(encoding="utf-8"))
        classes, num_samples = tuple(map(str, content["classes"])), content["num_samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{side} is damaged; put the right one back or convert again") from error
    if num_samples != layout.num_samples:
        raise DataError(
            f"{side} describes another file of {num_samples} samples, {path} holds "
            f"{layout.num_samples}; put the right one back or convert again"
        )
    if labels is not None and labels.max() >= len(classes):
        raise DataError(
            f"{path} holds the label {labels.max()}, but {side} names only {len(classes)} classes; "
            "put the right one back or convert again"
        )
    return classes
