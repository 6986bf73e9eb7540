"""Small ``.beton`` files that the tests of this folder share."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv.convert import convert

NUM_GREY = 203
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixels stay 0..255


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def smooth_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Fashion-MNIST-like folder: NUM_GREY random 28x28 training images, 20 test images."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", NUM_GREY), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        # The first pixel pair names the image, so that tests can recognise it.
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder


@pytest.fixture(scope="session")
def grey_beton(idx_folder: Path) -> Path:
    """The training images of `idx_folder`, raw."""
    path = idx_folder / "train.beton"
    convert("fashion-mnist", idx_folder, path)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth colour images of many shapes in three class folders, PNG and JPEG."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    shapes = [(64, 64), (40, 90), (90, 40), (33, 47), (120, 70), (48, 48), (75, 100), (200, 34)]
    for number, (height, width) in enumerate(shapes):
        name = ("ant", "bee", "cat")[number % 3]
        (folder / name).mkdir(exist_ok=True)
        suffix = "jpg" if number == 7 else "png"
        smooth_image(rng, height, width).save(folder / name / f"{number}.{suffix}")
    return folder


@pytest.fixture(scope="session")
def colour_beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder`, raw."""
    path = tmp_path_factory.mktemp("colour") / "colour.beton"
    convert("imagefolder", image_folder, path)
    return path


@pytest.fixture(scope="session")
def segmentation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 smooth colour images of four shapes with masks of 4 classes; some pixels are 255."""
    folder = tmp_path_factory.mktemp("segmentation")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    rng = np.random.default_rng(2)
    for number in range(12):
        height, width = [(64, 80), (80, 64), (50, 50), (45, 97)][number % 4]
        smooth_image(rng, height, width).save(folder / "images" / f"{number:02}.png")
        coarse = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (5, 5))
        coarse[0, :] = [0, 1, 2, 3, 255]
        mask = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        mask.save(folder / "annotations" / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def segmentation_beton(segmentation_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`segmentation_folder`, raw."""
    path = tmp_path_factory.mktemp("segmentation") / "scenes.beton"
    convert("segmentation", segmentation_folder, path)
    return path
