"""CIFAR and IDX archives in every form they are kept in, and downloads."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import urllib.error
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from data_ffcv import DataError
from data_ffcv.sources import download, open_source
from tests.data_ffcv.sources.images import random_pixels

NUM = {"train": 30, "test": 7}
CIFAR = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


def cifar_pixels(part: str) -> np.ndarray:
    """Planar, as the archives keep it: [N, 3072]."""
    return random_pixels(NUM[part], 3072, channels=1, seed=len(part))


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which the published archives come from."""

    dispatch: ClassVar[dict] = {**pickle._Pickler.dispatch}

    def save_string(self, value: bytes | str) -> None:
        value = value if isinstance(value, bytes) else value.encode()
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def pickle_as_published(content: dict) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_cifar(format: str, root: Path) -> Path:
    """Writes the extracted folder as it is published."""
    folder = root / CIFAR[format][0]
    folder.mkdir(parents=True)
    contents = {}
    for part in NUM:
        pixels, labels = cifar_pixels(part), [i % 10 for i in range(NUM[part])]
        if format == "cifar100":
            labels = [label * 9 for label in labels]
            contents[part] = {b"data": pixels, b"fine_labels": labels, b"coarse_labels": labels}
        elif part == "test":
            contents["test_batch"] = {b"data": pixels, b"labels": labels}
        else:
            for batch in range(5):
                rows = slice(6 * batch, 6 * batch + 6)
                contents[f"data_batch_{batch + 1}"] = {
                    b"data": pixels[rows],
                    b"labels": labels[rows],
                }
    names = [f"class{i}".encode() for i in range(100 if format == "cifar100" else 10)]
    key, file = (
        (b"fine_label_names", "meta") if format == "cifar100" else (b"label_names", "batches.meta")
    )
    contents[file] = {key: names}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle_as_published(content))
    return folder


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


@pytest.mark.parametrize("format", CIFAR)
def test_cifar_archive_folder_and_parent(tmp_path: Path, format: str):
    folder = write_cifar(format, tmp_path / "parent")
    (tmp_path / "packed").mkdir()
    archive = tmp_path / "packed" / CIFAR[format][1]
    pack(folder, archive)
    for path in (folder, folder.parent, archive, archive.parent):
        for part, number in NUM.items():
            source = open_source(format, path, part=part)
            assert len(source) == number and source.classes[3] == "class3"
            factor = 9 if format == "cifar100" else 1
            assert np.array_equal(source.labels, np.arange(number) % 10 * factor)
            expected = cifar_pixels(part).reshape(-1, 3, 32, 32)
            for index in (0, number - 1):
                image = np.asarray(source.read(index).image)
                assert np.array_equal(image.transpose(2, 0, 1), expected[index])


def test_an_archive_that_python_3_pickled_again_is_read(tmp_path: Path):
    """It writes bytes as a call of _codecs.encode."""
    folder = write_cifar("cifar100", tmp_path)
    names = [b"class%d" % number for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    assert b"_codecs" in (folder / "meta").read_bytes()
    assert open_source("cifar100", folder).classes[3] == "class3"


def test_code_in_a_pickle_is_refused(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = write_cifar("cifar100", tmp_path)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [Attack()]}))
    with pytest.raises(DataError, match=r"meta is not a CIFAR file .*mkdir"):
        open_source("cifar100", folder)
    assert not (tmp_path / "pwned").exists()


def test_damaged_cifar_is_named(tmp_path: Path):
    folder = write_cifar("cifar10", tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    pack(folder, archive)
    archive.write_bytes(archive.read_bytes()[:-9000])
    with pytest.raises(DataError, match=r"tar\.gz is not a complete archive"):
        open_source("cifar10", archive)
    (tmp_path / "file").write_text("no archive")
    with pytest.raises(DataError, match=r"^.*file is not a complete archive \(.*\); get it again$"):
        open_source("cifar10", tmp_path / "file")
    with pytest.raises(DataError, match="part must be train or test"):
        open_source("cifar10", folder, part="val")
    (folder / "data_batch_2").write_bytes((folder / "data_batch_2").read_bytes()[:900])
    with pytest.raises(DataError, match="data_batch_2 is not a CIFAR file"):
        open_source("cifar10", folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2 does not exist"):
        open_source("cifar10", folder)
    pack(folder, archive)
    with pytest.raises(DataError, match=r"tar\.gz does not hold data_batch_2"):
        open_source("cifar10", archive)
    (folder / "test_batch").write_bytes(
        pickle.dumps({b"data": cifar_pixels("test"), b"labels": [12] * 7})
    )
    with pytest.raises(DataError, match="labels outside its 10 classes"):
        open_source("cifar10", folder, part="test")
    with pytest.raises(DataError, match=r"does not exist; SRC must be .* or pass download"):
        open_source("cifar10", tmp_path / "nowhere")


def idx(array: np.ndarray) -> bytes:
    """http://yann.lecun.com/exdb/mnist/"""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_idx(folder: Path, prefix: str, suffix: str, dot: str = "-") -> np.ndarray:
    images = random_pixels(12 * 9, 6, channels=1, seed=len(prefix)).reshape(12, 9, 6)
    labels = np.arange(12, dtype=np.uint8) % 5
    folder.mkdir(exist_ok=True)
    for name, array in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
        content = gzip.compress(idx(array)) if suffix else idx(array)
        (folder / f"{prefix}-{name}-ubyte{suffix}").write_bytes(content)
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_parts(tmp_path: Path, suffix: str, dot: str):
    expected = {
        p: write_idx(tmp_path, f, suffix, dot) for p, f in (("train", "train"), ("test", "t10k"))
    }
    for part, images in expected.items():
        source = open_source("idx", tmp_path, part=part)
        assert source.classes == tuple("01234")
        assert np.array_equal(source.labels, np.arange(12) % 5)
        assert np.array_equal(source.read(11).image, np.dstack([images[11]] * 3))
    fashion = open_source("fashion-mnist", tmp_path, part="test")
    assert fashion.classes[4] == "Coat" and len(fashion.classes) == 10


def test_one_of_several_idx_sets(tmp_path: Path):
    for name in ("emnist-letters", "emnist-digits"):
        write_idx(tmp_path, f"{name}-test", ".gz")
    with pytest.raises(DataError, match=r"several sets \(emnist-digits.*emnist-letters"):
        open_source("idx", tmp_path, part="test")
    source = open_source("idx", tmp_path / "emnist-digits-test-images-idx3-ubyte.gz", part="test")
    assert len(source) == 12


def test_unpacked_and_packed_idx_are_one_set(tmp_path: Path):
    write_idx(tmp_path, "train", "")
    write_idx(tmp_path, "train", ".gz")
    assert len(open_source("idx", tmp_path)) == 12


def test_damaged_idx_is_named(tmp_path: Path):
    write_idx(tmp_path, "train", ".gz")
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    for content in (
        whole[:-9],
        whole[:20] + b"\0\0\0" + whole[23:],
        b"",
        gzip.compress(b"\0\0\x08\x03"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=r"train-labels.* is not a complete IDX file"):
            open_source("idx", tmp_path)
    labels.write_bytes(gzip.compress(idx(np.zeros(11, np.uint8))))
    with pytest.raises(DataError, match="holds 12 images but 11 labels"):
        open_source("idx", tmp_path)
    labels.write_bytes(gzip.compress(idx(np.full(12, 10, np.uint8))))
    with pytest.raises(DataError, match="labels outside its 10 classes"):
        open_source("fashion-mnist", tmp_path)
    labels.unlink()
    with pytest.raises(DataError, match=r"train-labels.* does not exist"):
        open_source("idx", tmp_path)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz does not exist"):
        open_source("idx", tmp_path, part="test")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 archive whose address and checksum stand in the table."""
    archive = tmp_path / "published.tar.gz"
    pack(write_cifar("cifar10", tmp_path), archive)
    entry = (archive.as_uri(), hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(download.ARCHIVES, "cifar10", {CIFAR["cifar10"][1]: entry})
    return archive


def test_download_is_checked_and_happens_once(tmp_path: Path, published: Path):
    folder = tmp_path / "new" / "folder"
    assert len(open_source("cifar10", folder, download=True)) == 30
    assert [file.name for file in folder.iterdir()] == ["cifar-10-python.tar.gz"]
    published.unlink()
    assert len(open_source("cifar10", folder, download=True, part="test")) == 7


def test_download_into_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DataError, match="file is not a folder; give the one to download into"):
        open_source("fashion-mnist", tmp_path / "file", download=True)


def test_download_of_something_else_leaves_nothing(tmp_path: Path, published: Path):
    published.write_bytes(published.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"sent something else than cifar-10-python\.tar\.gz"):
        open_source("cifar10", tmp_path / "new", download=True)
    assert not list((tmp_path / "new").iterdir())


def test_no_network_names_address_and_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(address: str, *_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        DataError, match=r"fashion-mnist.* cannot be fetched .*no route.*; copy train"
    ):
        open_source("fashion-mnist", tmp_path / "new", download=True)
