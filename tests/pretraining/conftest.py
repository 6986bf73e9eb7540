"""A tiny set of images and tiny recipes, which several packages' tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv.convert import convert
from tests.runs import NUM_CLASSES, NUM_IMAGES, Setup


@pytest.fixture(scope="session")
def png_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NUM_IMAGES random 10x10 images in NUM_CLASSES class folders."""
    folder = tmp_path_factory.mktemp("png")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        home = folder / f"class{number % NUM_CLASSES}"
        home.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def beton(png_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as they should be."""
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    convert("imagefolder", png_folder, path)
    return path


@pytest.fixture
def setup(tmp_path: Path, beton: Path) -> Setup:
    """A recipe of each method and a DeepSpeed config of each stage, to be launched at will."""
    return Setup(tmp_path, beton)


@pytest.fixture(scope="module")
def module_setup(tmp_path_factory: pytest.TempPathFactory, beton: Path) -> Setup:
    """The same for runs which several tests look at."""
    return Setup(tmp_path_factory.mktemp("module"), beton)
