"""CIFAR-10 and CIFAR-100, whose archives hold pickled arrays."""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_ffcv.errors import DataError
from data_ffcv.sources.arrays import ArraySource, check_part
from data_ffcv.sources.base import first_line
from data_ffcv.sources.download import fetch


def open_cifar(path: Path, part: str, num_classes: int, download: bool = False) -> ArraySource:
    """Reads one part of CIFAR-10 or -100, "python version".

    Args:
        path: The archive, the folder extracted from it, or a folder that holds either.
        part: train or test.
        num_classes: 10 or 100 (the fine classes).
        download: Fetch the archive into the folder `path` if neither is there.
    """
    check_part(part)
    if num_classes == 10:
        names = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
        meta, names_key, labels_key = "batches.meta", b"label_names", b"labels"
    else:
        names = [part]
        meta, names_key, labels_key = "meta", b"fine_label_names", b"fine_labels"
    path = _find_cifar(path, f"cifar-{num_classes}", meta, download)
    files = _read_files(path, [meta, *names])
    classes = tuple(name.decode() for name in _unpickle(path / meta, files[meta], names_key)[0])
    parts = [_unpickle(path / name, files[name], b"data", labels_key) for name in names]
    try:
        images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not a CIFAR archive ({first_line(error)}); get it again"
        ) from error
    return ArraySource(path, classes, labels, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


def _find_cifar(path: Path, name: str, meta: str, download: bool) -> Path:
    """Returns the archive or the extracted folder."""
    archive = path / f"{name}-python.tar.gz"
    extracted = f"{name}-batches-py" if name == "cifar-10" else f"{name}-python"
    for candidate in (path / meta, path / extracted / meta):
        if candidate.is_file():
            return candidate.parent
    if path.is_file() or archive.is_file():
        return path if path.is_file() else archive
    if download:
        fetch(name.replace("-", ""), path)
        return archive
    raise DataError(
        f"{path / meta} does not exist; SRC must be {archive.name}, the folder extracted from it "
        "or the one that holds it, or pass download"
    )


def _read_files(path: Path, names: list[str]) -> dict[str, bytes]:
    """Reads files of a folder, or of a .tar.gz whatever folder they are in."""
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in names}
        with tarfile.open(path, "r:*") as archive:
            contents = {}
            for member in archive:  # in one pass: going back would unpack it again
                name = member.name.split("/")[-1]
                if name in names and member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None  # only a folder or device has none
                    contents[name] = content.read()
            return {name: contents[name] for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; extract the archive again") from error
    except KeyError as error:
        raise DataError(f"{path} does not hold {error.args[0]}; get it again") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete archive ({first_line(error)}); get it again"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values; any other object is refused, not run."""

    _ALLOWED = frozenset(("_reconstruct", "ndarray", "dtype", "_frombuffer"))

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            # Files written by numpy 1 say numpy.core.
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1  # how Python 3 writes bytes for Python 2
        raise pickle.UnpicklingError(f"holds a {module}.{name}")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"holds a text in {encoding}")
    return text.encode("latin1")


def _unpickle(path: Path, content: bytes, *keys: bytes) -> list[Any]:
    try:
        values = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return [values[key] for key in keys]
    # Damaged bytes are instructions to the unpickler, which raises whatever these lead to.
    except Exception as error:
        raise DataError(
            f"{path} is not a CIFAR file ({first_line(error)}); get it again"
        ) from error
