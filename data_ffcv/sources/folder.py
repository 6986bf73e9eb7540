"""Image files in class folders, or in one folder beside a list of labels."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_ffcv.errors import DataError
from data_ffcv.sources.base import (
    IMAGE_SUFFIXES,
    PackedNames,
    Sample,
    find_duplicates,
    number_labels,
    printable,
    read_classes,
    read_text,
    shorten,
)
from data_ffcv.sources.image import read_image

_PARTS = frozenset(("train", "val", "valid", "validation", "test"))


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files; `files` are relative to `root`."""

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    files: PackedNames

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def read(self, index: int) -> Sample:
        image, notes = read_image(self.name(index))
        return Sample(image, None, notes)


def open_image_folder(
    root: Path, labels: Path | None = None, classes: Path | None = None
) -> FolderSource:
    """Lists SRC/<class>/**/<image>, or with `labels` the images of SRC in any folder.

    Hidden files and folders are left out. Without `classes` the classes are the sorted folder
    names or, with `labels`, what is written there.

    Args:
        root: For example ImageNet's ``ILSVRC/Data/CLS-LOC/train``, or ``.../val`` with `labels`.
        labels: Lines "NAME CLASS", where CLASS is a name or a number from 0, or ImageNet's
            ``LOC_val_solution.csv``.
        classes: Class names in the order of their numbers; see `read_classes`.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder with one folder per class")
    names = read_classes(classes) if classes else None
    if labels:
        return _open_flat(root, labels, names)
    folders = sorted(entry.name for entry in os.scandir(root) if _is_class_folder(entry))
    if not folders:
        raise DataError(
            f"{root} holds no class folder; put the images into one per class or pass labels"
        )
    if _PARTS.issuperset(folders):
        raise DataError(f"{root} holds parts ({', '.join(folders)}), not classes; give one of them")
    called = [printable(folder) for folder in folders]
    unknown = sorted(set(called) - set(names or called))
    if unknown:
        raise DataError(f"{root} holds folders that are no class of {classes}: {shorten(unknown)}")
    names = names or tuple(called)
    numbers = {name: number for number, name in enumerate(names)}
    counts: list[int] = []
    files = PackedNames(_list_classes(root, folders, counts))
    label_of_folder = np.array([numbers[name] for name in called], dtype=np.int64)
    return FolderSource(root, names, np.repeat(label_of_folder, counts), files)


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _list_classes(root: Path, folders: list[str], counts: list[int]) -> Iterator[str]:
    """Yields the images of one folder after the other, and appends the count of each."""
    for folder in folders:
        files = sorted(_image_files(root, folder))
        if not files:
            raise DataError(f"{root / folder} holds no image; add some or remove the folder")
        counts.append(len(files))
        yield from files


def _image_files(root: Path, folder: str) -> Iterator[str]:
    """Yields the images below a folder, relative to `root`."""
    for entry in os.scandir(root / folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if entry.name[entry.name.rfind(".") :].lower() in IMAGE_SUFFIXES:
            yield name
        elif entry.is_dir():
            yield from _image_files(root, name)


def _open_flat(root: Path, labels: Path, classes: tuple[str, ...] | None) -> FolderSource:
    """Opens images whose labels stand in a text file, in its order."""
    listed, texts = _read_labels(labels)
    files = _by_stem(root)
    for fault, names in (
        (f"{labels} names twice", find_duplicates(listed)),
        (
            f"{labels} names what {root} does not hold",
            [name for name in listed if name not in files],
        ),
        (f"{labels} has no label for", sorted(files.keys() - set(listed))),
    ):
        if names:
            raise DataError(f"{fault}: {shorten(names)}; every image must have one line")
    numbers, classes = number_labels(texts, classes, labels)
    return FolderSource(root, classes, numbers, PackedNames(files[name] for name in listed))


def _by_stem(root: Path) -> dict[str, str]:
    """Returns the images below `root` by their names without suffix, as labels may name them."""
    files: dict[str, str] = {}
    for file in sorted(_image_files(root, "")):
        first = files.setdefault(_stem(file), file)
        if first != file:
            raise DataError(
                f"{root} holds {first} and {file}, which labels cannot tell apart; remove one"
            )
    return files


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _read_labels(file: Path) -> tuple[list[str], list[str]]:
    """Reads names without suffix, and the class of each."""
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if lines and lines[0].replace(" ", "").lower() == "imageid,predictionstring":
        # A prediction is a synset and a box, repeated for each object of the one class.
        lines = [" ".join(line.replace(",", " ").split()[:2]) for line in lines[1:]]
    if lines and all(line.strip().isdigit() for line in lines):
        raise DataError(
            f"{file} holds bare numbers, which count the classes in an order of the devkit's own; "
            "use LOC_val_solution.csv, or a file with lines NAME CLASS"
        )
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    broken = [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2]
    if broken or not lines:
        fault = f"has lines without a class: {shorten(broken)}" if broken else "is empty"
        raise DataError(f"{file} {fault}; every line must be NAME CLASS")
    return [_stem(name) for name, _ in pairs], [text for _, text in pairs]
