"""Low-shot splits of a training set: drawn by class with a seed, or read from published lists."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_ffcv import FolderInfo, ImagesInfo
from data_ffcv.sources import open_source
from data_ffcv.splits import conversion_order
from eval.frozen.features import class_labels
from mlomae.errors import UserError


def draw_per_class(info: ImagesInfo, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` images of every class.

    Raises:
        UserError: a class has fewer.
    """
    num_images = np.bincount(_labels(info), minlength=info.num_classes)
    if (fewest := int(num_images.min())) < count:
        name = info.classes[int(num_images.argmin())]
        raise UserError(
            f"class '{name}' of {info.path} has {fewest} images, too few for {count} per class: "
            "lower --num_per_class"
        )
    return _draw(info, np.full(info.num_classes, count), seed)


def draw_fraction(info: ImagesInfo, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of this share of every class, rounded to whole images.

    Raises:
        UserError: of a class that is none.
    """
    num_images = np.bincount(_labels(info), minlength=info.num_classes)
    counts = np.round(num_images * fraction).astype(np.int64)
    if not counts.all():
        name, few = info.classes[int(counts.argmin())], int(num_images[counts.argmin()])
        raise UserError(
            f"class '{name}' of {info.path} has {few} images, too few for {fraction:.2%} of them: "
            "raise or remove this one of --fractions"
        )
    return _draw(info, counts, seed)


def _draw(info: ImagesInfo, counts: np.ndarray, seed: int) -> np.ndarray:
    """The first images of one permutation, so a larger split of a seed holds the smaller ones."""
    order = np.random.default_rng(seed).permutation(info.num_samples)
    order = order[np.argsort(_labels(info)[order], kind="stable")]
    labels = _labels(info)[order]
    place = np.arange(len(order)) - np.searchsorted(labels, labels)  # within the class
    return np.sort(order[place < counts[labels]])


def read_lists(info: ImagesInfo, files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Sorted indices of the images that each list names, by the list's file name.

    A line is a file name such as n01440764_10026.JPEG, with or without folders before it.

    Raises:
        UserError: the set has no file names, or none of this name or several; a list cannot be
            read, or has no image of some class.
    """
    if not isinstance(info, FolderInfo):
        raise UserError(
            f"--split_list needs file names, which {info.path} does not hold: give the folder of "
            "class folders as --train"
        )
    names = _Names(info)
    return {file.stem: _read_list(info, file, names) for file in files}


class _Names:
    """Which image of a folder has which name."""

    def __init__(self, info: FolderInfo) -> None:
        source = open_source("imagefolder", info.path)
        self._by_path: dict[str, int] = {}
        self._by_name: dict[str, int | None] = {}  # None for a name in several folders
        for index, number in enumerate(conversion_order(info.num_samples).tolist()):
            path = Path(source.name(number)).relative_to(info.path)
            self._by_path[path.as_posix()] = index
            self._by_name[path.name] = None if path.name in self._by_name else index

    def __call__(self, line: str) -> int | None:
        """The image of a line; None for no image, or one of several."""
        path = self._by_path.get(line)
        return self._by_name.get(Path(line).name) if path is None else path


def _read_list(info: ImagesInfo, file: Path, names: _Names) -> np.ndarray:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split_list {file} cannot be read ({error}): give a text file") from None
    indices = {line.strip(): names(line.strip()) for line in lines if line.strip()}
    if unknown := [line for line, index in indices.items() if index is None]:
        raise UserError(
            f"{file} names {unknown[0]}, which is no image of {info.path}, or one of several with "
            "this name: fix the list, or write CLASS/NAME"
        )
    chosen = np.unique(np.fromiter(indices.values(), np.int64))
    if missing := set(range(info.num_classes)) - set(_labels(info)[chosen].tolist()):
        name = info.classes[min(missing)]
        raise UserError(f"{file} has no image of class '{name}' of {info.path}: fix the list")
    return chosen


def _labels(info: ImagesInfo) -> np.ndarray:
    return class_labels(info, str(info.path))
