"""WebDataset tars: samples are files of one name with different suffixes."""

import json
import os
import re
import sys
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_ffcv.errors import DataError
from data_ffcv.sources.base import (
    IMAGE_SUFFIXES,
    PackedNames,
    Sample,
    number_labels,
    read_classes,
    shorten,
)
from data_ffcv.sources.image import read_image

_Span = tuple[int, int]  # position in the tar and length, in bytes


@dataclass(frozen=True, eq=False)
class TarSource:
    """Images inside tars.

    Attributes:
        tars: The files.
        keys: Name of each sample, without suffix.
        spans: int64 [num_samples, 3]: which tar, position in it, number of bytes.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    tars: tuple[Path, ...]
    keys: PackedNames
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, index: int) -> str:
        return f"{self.tars[self.spans[index, 0]]}, {self.keys[index]}"

    def read(self, index: int) -> Sample:
        tar, position, num_bytes = self.spans[index].tolist()
        # Opened each time: there may be more tars than a process may keep open.
        with self.tars[tar].open("rb") as file:
            content = _read_span(file.fileno(), (position, num_bytes))
        image, notes = read_image(content)
        return Sample(image, None, notes)


def open_tars(path: Path, classes: Path | None = None) -> TarSource:
    """Indexes tars; the label is the number or class name in .cls, or "label" in .json.

    Args:
        path: A tar, a folder of tars, or a pattern such as ``train-{000..146}.tar``.
        classes: Class names; see `read_classes`. Without them classes are called as in the tars.
    """
    names = read_classes(classes) if classes else None
    tars = _find_tars(path)
    texts: list[str] = []
    spans = array("q")
    keys = PackedNames(_index_tars(tars, texts, spans))
    labels, names = number_labels(texts, names, path)
    table = np.frombuffer(spans, np.int64).reshape(-1, 3)
    return TarSource(names, labels, tuple(tars), keys, table)


def _find_tars(path: Path) -> list[Path]:
    if path.is_dir():
        tars = sorted(file for file in path.glob("*.tar") if not file.name.startswith("."))
    else:
        tars = [Path(name) for name in expand_braces(str(path))]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing or not tars:
        what = f"{shorten(missing)} does not exist" if missing else f"{path} holds no .tar"
        raise DataError(
            f"{what}; give a tar, a folder of tars or a pattern like a-{{000..146}}.tar"
        )
    return tars


def expand_braces(pattern: str) -> list[str]:
    """Expands {a,b} and {000..146}, as the shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    return [
        name
        for choice in choices
        for name in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _index_tars(tars: list[Path], texts: list[str], spans: "array[int]") -> Iterator[str]:
    """Yields the key of each sample, and appends its label and its span."""
    for number, tar in enumerate(tars):
        with tar.open("rb") as file:
            members = _list_members(tar)
            if not members:
                raise DataError(f"{tar} holds no sample; give tars with NAME.jpg and NAME.cls")
            for key, parts in members.items():
                span, text = _pick_parts(file.fileno(), parts, f"{tar}, {key}")
                texts.append(sys.intern(text))  # few different ones
                spans.extend((number, *span))
                yield key


def _list_members(tar: Path) -> dict[str, dict[str, _Span]]:
    """Returns {key: {suffix: span}}; the key is the path up to the first dot of the name."""
    members: dict[str, dict[str, _Span]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
                match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                if not match or not member.isfile():
                    continue
                parts = members.setdefault(match[1], {})
                suffix = f".{match[2].lower()}"
                if suffix in parts:
                    raise DataError(f"{tar} holds {member.name} twice; write the tar again")
                parts[suffix] = member.offset_data, member.size
            _check_end(tar, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{tar} is not a complete, uncompressed tar ({error}); unpack or get it again"
        ) from error
    return members


def _check_end(tar: Path, end: int) -> None:
    """Raises OSError unless the tar ends where its index does: tarfile stops at any zero block."""
    with tar.open("rb") as file:
        file.seek(end)
        rest = file.read(1 << 20)
    if not rest or any(rest):
        raise OSError("it is cut off, or other data follow its end mark")


def _pick_parts(file: int, parts: dict[str, _Span], name: str) -> tuple[_Span, str]:
    """Returns where the image of a sample lies, and its label as text."""
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        actual = f"several images ({', '.join(images)})" if images else "no image"
        raise DataError(f"{name} has {actual}; each sample needs one")
    try:
        return parts[images[0]], _read_label(file, parts)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{name} has no label ({error!r}); add .cls, or .json with "label", a number or a name'
        ) from error


def _read_label(file: int, parts: dict[str, _Span]) -> str:
    if ".cls" in parts:
        label = _read_span(file, parts[".cls"]).decode().strip()
    else:
        label = json.loads(_read_span(file, parts[".json"]))["label"]
    if type(label) not in (int, str) or label == "":
        raise ValueError(f"label is {label!r}")
    return str(label)


def _read_span(file: int, span: _Span) -> bytes:
    return os.pread(file, span[1], span[0])
