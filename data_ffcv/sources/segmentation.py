"""Images with a mask of class numbers for each."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from data_ffcv.beton.layout import IGNORED
from data_ffcv.errors import DataError
from data_ffcv.sources.base import IMAGE_SUFFIXES, Sample, read_classes, shorten
from data_ffcv.sources.image import open_image, read_image

_EXACT = ("PNG", "BMP", "TIFF", "GIF")  # PGM is not: Pillow scales its values
_SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255
_NUM_THREADS = 8


@dataclass(frozen=True, eq=False)
class SegmentationSource:
    """Pairs of files. `table` uint8 [256] gives the class number of each value of a mask file."""

    classes: tuple[str, ...]
    images: Sequence[Path]
    masks: Sequence[Path]
    table: np.ndarray
    labels: None = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.images[index])

    def read(self, index: int) -> Sample:
        image, notes = read_image(self.images[index])
        values = _read_mask(self.masks[index])
        mask = Image.fromarray(self.table[values])
        if mask.size != image.size:
            turned = " after its EXIF rotation" if "EXIF rotation" in notes else ""
            raise DataError(
                f"its mask {self.masks[index]} is {_format_size(mask)}, but the image is "
                f"{_format_size(image)}{turned}; make them equal"
            )
        self._check_values(values, self.masks[index])
        return Sample(image, mask, notes)

    def _check_values(self, values: np.ndarray, file: Path) -> None:
        present = _present(values)
        numbers = self.table[present]
        wrong = present[(numbers >= len(self.classes)) & (numbers != IGNORED)]
        if wrong.size:
            raise DataError(
                f"its mask {file} holds the value {wrong[0]}, but there are {len(self.classes)} "
                "classes; fix the mask, the file of classes or ignore_index"
            )


def open_segmentation(
    path: Path, part: str, classes: Path | None = None, ignore_index: int | None = None
) -> SegmentationSource:
    """Pairs SRC/images/[<part>/]NAME.* with SRC/annotations/[<part>/]NAME.*.

    Without `classes` all masks are read once to find the largest class number.

    Args:
        path: SRC.
        part: The folder below both; not used where they have no folders.
        classes: Class names; see `read_classes`.
        ignore_index: Value that means "no class": it becomes 255, and larger ones move down by
            one (0 for ADE20K).
    """
    if ignore_index is not None and not 0 <= ignore_index <= IGNORED:
        raise DataError(f"ignore_index must be in [0, {IGNORED}], got {ignore_index}")
    images = _list_stems(_part_folder(path / "images", part))
    masks = _list_stems(_part_folder(path / "annotations", part))
    for missing, where, what in (
        (images.keys() - masks.keys(), "annotations", "mask"),
        (masks.keys() - images.keys(), "images", "image"),
    ):
        if missing:
            raise DataError(f"{path / where} has no {what} for {shorten(sorted(missing))}; add it")
    files = [masks[stem] for stem in images]
    table = _to_table(ignore_index)
    names = read_classes(classes) if classes else _count_classes(files, table)
    return SegmentationSource(names, list(images.values()), files, table)


def _part_folder(folder: Path, part: str) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist; SRC must hold the folders images and annotations"
        )
    parts = sorted(
        entry.name for entry in folder.iterdir() if _is_visible(entry) and entry.is_dir()
    )
    if parts and part not in parts:
        raise DataError(f"{folder} has no part {part!r}; choose one of {', '.join(parts)}")
    return folder / part if parts else folder


def _list_stems(folder: Path) -> dict[str, Path]:
    """Returns the image files of a folder by their names without suffix, sorted."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if not _is_visible(file) or file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if file.stem in files:
            raise DataError(f"{folder} holds {files[file.stem].name} and {file.name}; remove one")
        files[file.stem] = file
    if not files:
        raise DataError(f"{folder} holds no image; give the folder that holds images/")
    return files


def _is_visible(file: Path) -> bool:
    return not file.name.startswith(".")


def _to_table(ignore_index: int | None) -> np.ndarray:
    table = np.arange(256)
    if ignore_index is not None and ignore_index != IGNORED:
        table[ignore_index + 1 : IGNORED] -= 1
        table[ignore_index] = IGNORED
    return table.astype(np.uint8)


def _count_classes(files: list[Path], table: np.ndarray) -> tuple[str, ...]:
    """Returns "0", "1", ... up to the largest class number in any mask."""

    def largest(file: Path) -> int:
        numbers = table[_present(_read_mask(file))]
        return max((int(number) for number in numbers if number != IGNORED), default=-1)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        num_classes = max(pool.map(largest, files)) + 1
    if not num_classes:
        raise DataError(f"the masks beside {files[0]} show no class; fix them or ignore_index")
    return tuple(map(str, range(num_classes)))


def _present(values: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.bincount(values.ravel(), minlength=256))


def _read_mask(file: Path) -> np.ndarray:
    """Returns the values of a mask file: uint8 [height, width]."""
    try:
        with open_image(file.read_bytes()) as image:
            return _to_values(image)
    except DataError as error:
        raise DataError(f"the mask {file} cannot be used: {error}") from error


def _to_values(image: ImageFile.ImageFile) -> np.ndarray:
    if image.format not in _EXACT:
        raise DataError(f"{image.format} alters values; write it as PNG")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise DataError(
            f"it holds colours (mode {image.mode}), not class numbers; write it as PNG with one "
            "channel (Pillow's mode L or P)"
        )
    args = image.tile[0].args if image.tile else ""
    raw_mode = args[0] if isinstance(args, tuple) else args
    spread = _SPREAD.get(raw_mode or "", 1)
    dtype = np.dtype(np.int64 if image.mode.startswith("I") else np.uint8)
    values: np.ndarray = np.asarray(image).astype(dtype)
    wrong = values[(values < 0) | (values > IGNORED)]
    if wrong.size:
        raise DataError(f"it holds the value {wrong[0]}; class numbers must be below {IGNORED}")
    return (values // spread).astype(np.uint8)


def _format_size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
