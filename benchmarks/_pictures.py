"""Pictures that are as hard to compress as photographs, and the files that contenders read.

Their spectrum falls as 1 / f^1.5 with random phases, the channels nearly alike: 256x256 pixels at
JPEG quality 90 take 22 kB on average, as ImageNet's photographs do.
"""

import os
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_ffcv.beton.layout import (
    ALLOCATION,
    FIELD,
    HEADER,
    LABELLED,
    LABELLED_FIELDS,
    METADATA_START,
    RAW,
    VERSION,
)
from data_ffcv.convert import convert
from data_ffcv.sources import open_source

JPEG_QUALITY = 90
NUM_CLASSES = 10
NUM_SMALL = 10_000  # as many as one part in five of CIFAR-10
NUM_MOCK = 1_281_167  # ImageNet's training set
_NUM_TARS = 8
_POWER = 1.5  # gives the size of the files; 1.25 would give 33 kB
_PAGE_SIZE = 8 << 20

Files = dict[str, Path]
"""Forms of one set of images: folder, tars, arrays (a CIFAR-10 archive), raw, jpg."""


def draw_pictures(count: int, size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields pictures, uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf  # no mean
    shape = (2, 3, size, size // 2 + 1)
    for _ in range(count):
        real, imaginary = rng.standard_normal(shape, np.float32)
        spectrum = (real + 1j * imaginary) / frequency**_POWER
        spectrum[1:] = 0.9 * spectrum[0] + 0.3 * spectrum[1:]
        channels = np.fft.irfft2(spectrum, s=(size, size))
        channels /= channels.std(axis=(1, 2), keepdims=True)
        yield np.clip(128 + 50 * channels, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def make_large(given: Path | None, num_images: int, out: Path, num_workers: int) -> Files:
    """Returns folder, tars and both ``.beton`` files of 256x256 pictures, or of given ones."""
    folder = given or _cached(f"folder_{num_images}", lambda path: _draw_folder(path, num_images))
    files = {"folder": folder, "tars": out / "tars"}
    _pack_tars(folder, files["tars"])
    for mode in ("raw", "jpg"):
        files[mode] = out / f"{mode}.beton"
        convert("imagefolder", folder, files[mode], write_mode=mode, num_workers=num_workers)
    return files


def make_small(num_images: int, out: Path, num_workers: int) -> Files:
    """Returns 32x32 pictures as a CIFAR-10 archive, and as a raw ``.beton``."""
    folder = _cached(f"arrays_{num_images}", lambda path: _draw_archive(path, num_images))
    files = {"arrays": folder, "raw": out / "small.beton"}
    convert("cifar10", folder, files["raw"], num_workers=num_workers)
    return files


def read_arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the archive's training images, uint8 [n, 32, 32, 3], and labels, int64 [n]."""
    source = open_source("cifar10", folder, part="train")
    return source.images, source.labels


def make_mock(path: Path) -> Path:
    """Writes a ``.beton`` of ImageNet's number of 256x256 images whose pixels are a hole."""
    rows, table = np.zeros(NUM_MOCK, LABELLED), np.zeros(NUM_MOCK, ALLOCATION)
    num_bytes = 256 * 256 * 3
    start = -(-(METADATA_START + rows.nbytes) // _PAGE_SIZE) * _PAGE_SIZE
    page, place = np.divmod(np.arange(NUM_MOCK), _PAGE_SIZE // num_bytes)
    pointers = start + page * _PAGE_SIZE + place * num_bytes
    rows["image"]["mode"], rows["image"]["data_ptr"] = RAW, pointers
    rows["image"]["height"] = rows["image"]["width"] = 256
    rows["label"] = np.arange(NUM_MOCK) % 1000
    table["sample_id"], table["ptr"], table["size"] = np.arange(NUM_MOCK), pointers, num_bytes
    end = start + (int(page[-1]) + 1) * _PAGE_SIZE
    header = np.array((VERSION, 2, _PAGE_SIZE, NUM_MOCK, end), HEADER)
    fields = np.zeros(2, FIELD)
    fields["type_id"], fields["name"] = zip(*LABELLED_FIELDS, strict=True)
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
        file.seek(end)
        file.write(table.tobytes())
    return path


def describe(files: Files) -> dict[str, int | float]:
    """Returns the number of files of a folder, and their mean size in kB."""
    sizes = [path.stat().st_size for path in _images_of(files["folder"])]
    return {"num_images": len(sizes), "mean_kB": round(sum(sizes) / len(sizes) / 1e3, 1)}


def _cached(name: str, draw) -> Path:
    """Returns a folder that is drawn once and kept among the user's caches.

    In the machine's temporary folder somebody else could put one of that name there first.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = caches / "mlomae_pictures" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent))
        draw(partial)
        partial.rename(path)
    return path


def _draw_folder(path: Path, num_images: int) -> None:
    for number, pixels in enumerate(draw_pictures(num_images, 256)):
        folder = path / f"class{number % NUM_CLASSES}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=JPEG_QUALITY)


def _draw_archive(path: Path, num_images: int) -> None:
    pixels = np.stack([*draw_pictures(num_images, 32)])
    rows = pixels.transpose(0, 3, 1, 2).reshape(num_images, -1)
    labels = np.arange(num_images) % NUM_CLASSES
    for number in range(5):
        part = {b"data": rows[number::5], b"labels": labels[number::5]}
        (path / f"data_batch_{number + 1}").write_bytes(pickle.dumps(part))
    names = [f"class{label}".encode() for label in range(NUM_CLASSES)]
    (path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))


def _images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def _pack_tars(folder: Path, out: Path) -> None:
    """Packs a folder for WebDataset: shuffled, a label file beside each image."""
    out.mkdir()
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    images = np.random.default_rng(0).permutation(np.array(_images_of(folder), object))
    for number in range(_NUM_TARS):
        with tarfile.open(out / f"{number}.tar", "w") as tar, tempfile.TemporaryDirectory() as temp:
            label = Path(temp) / "label"
            for count, path in enumerate(images[number::_NUM_TARS]):
                label.write_text(str(classes.index(path.parent.name)))
                tar.add(path, f"{count:06}.jpg")
                tar.add(label, f"{count:06}.cls")
