"""Reading image collections as they are published: ImageFolder, CIFAR and MNIST-like archives."""

import gzip
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_ffcv.errors import DataError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"))
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class Source(Protocol):
    """Labelled images that can be read one by one.

    Attributes:
        classes: Class names; a label is a position in them.
        labels: int64 [num_samples].
    """

    classes: tuple[str, ...]
    labels: np.ndarray

    def name(self, index: int) -> str:
        """Returns what to call a sample in an error."""

    def image(self, index: int) -> Image.Image:
        """Returns a sample as an RGB image."""


@dataclass
class ArraySource:
    """Images that are all in memory: uint8 [N, H, W] grey or [N, H, W, 3]."""

    path: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray

    def name(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")


@dataclass
class FolderSource:
    """Image files in class folders."""

    classes: tuple[str, ...]
    labels: np.ndarray
    paths: list[str]

    def name(self, index: int) -> str:
        return self.paths[index]

    def image(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")


def open_image_folder(folder: Path) -> FolderSource:
    """Lists SRC/<class>/**/<image>; classes are the sorted folder names."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder with one folder per class")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _image_files(folder / name)
        if not found:
            raise DataError(f"{folder / name} holds no image; add some or remove the folder")
        paths += found
        labels += [label] * len(found)
    if not classes:
        raise DataError(f"{folder} holds no class folder; put the images into one per class")
    return FolderSource(tuple(classes), np.array(labels, dtype=np.int64), paths)


def _image_files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )


def open_fashion_mnist(folder: Path, split: str) -> ArraySource:
    """Reads the gzipped IDX pair of one split; any MNIST-like set with ten classes will do."""
    prefix = {"train": "train", "test": "t10k"}[split]
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    images = _read_idx(path, 3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{path} holds {len(images)} images but {len(labels)} labels; get it again")
    return ArraySource(path, FASHION_MNIST_CLASSES, labels, images)


def _read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist/)."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; SRC must be the folder that holds it")
    try:
        content = gzip.decompress(path.read_bytes())
        shape = struct.unpack_from(f">{num_dims}I", content, 4)
        if content[:4] != bytes((0, 0, 8, num_dims)):
            raise ValueError("wrong magic number")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path} is not a complete IDX file ({error}); get it again") from error


def open_cifar(folder: Path, split: str, num_classes: int) -> ArraySource:
    """Reads CIFAR-10 or -100 from the extracted "python version" archive."""
    if num_classes == 10:
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        meta, names_key, labels_key = "batches.meta", b"label_names", b"labels"
    else:
        names = [split]
        meta, names_key, labels_key = "meta", b"fine_label_names", b"fine_labels"
    classes = tuple(name.decode() for name in _unpickle(folder / meta, names_key)[0])
    parts = [_unpickle(folder / name, b"data", labels_key) for name in names]
    images = np.concatenate([pixels for pixels, _ in parts])
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySource(folder, classes, labels, np.ascontiguousarray(images))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values; any other object is refused, not run."""

    _ALLOWED = frozenset(("_reconstruct", "ndarray", "dtype", "_frombuffer"))

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            # Files written by numpy 1 say numpy.core.
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"holds a {module}.{name}")


def _unpickle(path: Path, *keys: bytes) -> list[Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; SRC must be the folder that holds it")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        return [content[key] for key in keys]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a CIFAR file ({error}); extract it again") from error
