"""What every source of images has in common."""

import os
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from data_ffcv.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".webp", ".tif", ".tiff")
)
_MAX_CLASSES = 1 << 20  # larger numbers count something else
_NUM_NAMED = 3  # an error names this many of the things that are wrong


class Sample(NamedTuple):
    """One image and what belongs to it.

    Attributes:
        image: Mode RGB.
        mask: Class numbers, mode L, as large as `image`, 255 = ignored; None where there is none.
        notes: What was done to an odd image, for example "CMYK to RGB".
    """

    image: Image.Image
    mask: Image.Image | None
    notes: tuple[str, ...]


class ImageSource(Protocol):
    """Images that can be read one by one, from any thread and in any order."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label or a mask's value is a position in them."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each sample, int64 [num_samples]; None for segmentation."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def name(self, index: int) -> str:
        """Returns what to call a sample in an error."""

    def read(self, index: int) -> Sample:
        """Returns a sample; raises some exception, which need not name it, if it is unreadable."""


class PackedNames:
    """An immutable list of names in one block of memory, a third of a list of strings."""

    def __init__(self, names: Iterable[str]) -> None:
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += os.fsencode(name)
            ends.append(len(block))
        self._block, self._ends = bytes(block), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])


def read_classes(file: Path) -> tuple[str, ...]:
    """Reads class names: one per line, or those of a ``.beton``.

    Of lines like "n01440764 tench, Tinca tinca" (ImageNet's LOC_synset_mapping.txt) only the
    synset is taken, since that is what folders are called.
    """
    if file.suffix == ".beton":
        from data_ffcv.beton.info import inspect_beton

        return inspect_beton(file).classes
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    words = [line.split()[0] for line in lines]
    if all(len(word) == 9 and word[0] == "n" and word[1:].isdigit() for word in words):
        lines = words
    twice = find_duplicates(lines)
    if twice or not lines:
        fault = f"names {shorten(twice)} twice" if twice else "is empty"
        raise DataError(f"{file} {fault}; write every class name on a line of its own")
    return tuple(lines)


def number_labels(
    texts: Sequence[str], classes: tuple[str, ...] | None, file: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Turns class names, or numbers from 0, into labels.

    Args:
        texts: A class name or a class number per sample, from `file`.
        classes: All class names in order. None: the names in `texts`, sorted, or, where all are
            numbers, as many as the largest asks for.
        file: What an error names.

    Returns:
        Labels int64 [num_samples] and the class names.

    Raises:
        DataError: a class is not in `classes`.
    """
    labels = set(texts)
    are_numbers = all(text.isascii() and text.isdigit() for text in labels)
    if classes is None:
        odd = sorted(text for text in labels if re.fullmatch(r"[-+]?[\d.]+", text))
        if odd and not are_numbers:  # sorted as names, 10 would come before 2
            raise DataError(
                f"{file} mixes class numbers from 0 with something else (see {shorten(odd)}); "
                "fix it or give the classes"
            )
        numbered = are_numbers and numbered_class_names(max(map(int, labels)), file)
        classes = numbered or tuple(sorted(labels))
    if are_numbers and not labels.issubset(classes):
        numbers = {text: int(text) for text in labels}
    else:
        positions = {name: number for number, name in enumerate(classes)}
        numbers = {text: positions.get(text, len(classes)) for text in labels}
    unknown = sorted(text for text in labels if numbers[text] >= len(classes))
    if unknown:
        raise DataError(
            f"{file} names classes that are not among the {len(classes)} given: "
            f"{shorten(unknown)}; fix them or the file of classes"
        )
    return np.fromiter((numbers[text] for text in texts), np.int64, len(texts)), classes


def numbered_class_names(largest: int, file: Path) -> tuple[str, ...]:
    """Returns the names "0", "1", ... of classes that have none, up to the largest number."""
    if largest >= _MAX_CLASSES:
        raise DataError(f"{file} has the class number {largest}; count the classes from 0")
    return tuple(map(str, range(largest + 1)))


def read_text(file: Path) -> str:
    """Returns the content of a text file, or raises DataError naming it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a UTF-8 text"
        raise DataError(f"{file} cannot be read ({reason}); give another file") from error


def find_duplicates(names: Iterable[str]) -> list[str]:
    """Returns the names that come more than once, each time they come again."""
    seen: set[str] = set()
    twice: list[str] = []
    for name in names:
        if name in seen:
            twice.append(name)
        seen.add(name)
    return twice


def printable(name: str) -> str:
    """Returns a file's name with escapes for the bytes that are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def first_line(error: Exception) -> str:
    """Returns what an error says, without the details that some add on further lines."""
    return next(iter(str(error).splitlines()), "").rstrip(" :") or type(error).__name__


def shorten(names: Sequence[str]) -> str:
    """Returns the first few names and how many more there are."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
