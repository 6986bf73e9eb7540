"""Small images that come as one array: IDX files as MNIST and Fashion-MNIST have them."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_ffcv.errors import DataError
from data_ffcv.sources.base import Sample
from data_ffcv.sources.download import fetch

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images that are all in memory: uint8 [N, H, W] grey or [N, H, W, 3]."""

    path: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray

    def __post_init__(self) -> None:
        fault = ""
        if len(self.images) != len(self.labels):
            fault = f"{len(self.images)} images but {len(self.labels)} labels"
        elif not len(self.labels):
            fault = "no image"
        elif not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            fault = f"labels outside its {len(self.classes)} classes"
        if fault:
            raise DataError(f"{self.path} holds {fault}; get it again")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def read(self, index: int) -> Sample:
        return Sample(Image.fromarray(self.images[index]).convert("RGB"), None, ())


def open_fashion_mnist(path: Path, part: str, download: bool = False) -> ArraySource:
    """Reads one part of Fashion-MNIST from the folder of its IDX files."""
    if download:
        fetch("fashion-mnist", path)
    return open_idx(path, part, FASHION_MNIST_CLASSES)


def open_idx(path: Path, part: str, classes: tuple[str, ...] | None = None) -> ArraySource:
    """Reads a pair of MNIST-like IDX files, gzipped or not.

    Args:
        path: Their folder, or the file with the images where a folder holds several sets.
        part: train, or test (which MNIST calls t10k).
        classes: Names; without them the classes are called 0, 1, 2, ...
    """
    path = path if path.is_file() else _find_idx(path, part)
    images = _read_idx(path, 3)
    other = path.name.replace("images", "labels").replace("idx3", "idx1")
    labels = _read_idx(_with_or_without_gz(path.with_name(other)), 1).astype(np.int64)
    if classes is None:
        classes = tuple(map(str, range(labels.max(initial=0) + 1)))
    return ArraySource(path, classes, labels, images)


def _find_idx(folder: Path, part: str) -> Path:
    check_part(part)
    prefixes = ("train",) if part == "train" else ("t10k", "test")
    candidates = {
        file
        for prefix in prefixes
        for file in folder.glob(f"*{prefix}-images[-.]idx3-ubyte*")
        if file.suffix == ".gz" or not file.with_name(f"{file.name}.gz").exists()
    }
    if not candidates:
        expected = folder / f"{prefixes[0]}-images-idx3-ubyte.gz"
        raise DataError(f"{expected} does not exist; SRC must be the folder that holds it")
    if len(candidates) > 1:
        names = ", ".join(sorted(file.name for file in candidates))
        raise DataError(f"{folder} holds several sets ({names}); give one of these files as SRC")
    return candidates.pop()


def _with_or_without_gz(path: Path) -> Path:
    if path.is_file():
        return path
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    return other if other.is_file() else path


def check_part(part: str) -> None:
    """Raises DataError unless the part is one that these archives have."""
    if part not in ("train", "test"):
        raise DataError(f"part must be train or test, got {part!r}")


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist/)."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; SRC must be the folder that holds it")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        shape = struct.unpack_from(f">{num_dims}I", content, 4)
        if content[:4] != bytes((0, 0, 8, num_dims)):
            raise ValueError("wrong magic number")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a complete IDX file ({error}); get it again") from error
