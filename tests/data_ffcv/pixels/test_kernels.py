"""The compiled crop, resize and flip against Pillow and numpy, image by image."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_ffcv import Augmentation
from tests.data_ffcv.conftest import smooth_image


@pytest.fixture(scope="module")
def augment() -> Callable[..., np.ndarray]:
    """augment(image [H, W, 3], augmentation, num_draws, seed) -> [num_draws, h, w, 3]."""
    from data_ffcv.pixels.kernels import augment_images, to_settings

    def run(
        image: np.ndarray, augmentation: Augmentation, num_draws: int = 1, seed: int = 0
    ) -> np.ndarray:
        out = np.full((num_draws, augmentation.height, augmentation.width, 3), 77, np.uint8)
        table = np.array([(index, 0, -1, *image.shape[:2]) for index in range(num_draws)])
        nothing = np.empty(0, np.uint8)
        augment_images(
            np.ascontiguousarray(image).reshape(-1),
            nothing,
            table,
            0,
            to_settings(augmentation, seed),
            out,
            nothing.reshape(0, 0, 0),
        )
        return out

    return run


def random_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SHAPES = [(28, 28), (20, 60), (60, 20), (97, 100), (40, 12), (300, 41), (33, 240)]


@pytest.mark.parametrize("image_size", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_equals_pillow(augment, shape: tuple[int, int], image_size: int):
    """The whole image as the crop: enlarging and shrinking, on white noise, the hardest case."""
    pixels = random_pixels(*shape)
    aspect = shape[1] / shape[0]
    augmentation = Augmentation(
        "random_resized_crop", image_size, scale=(1, 1), ratio=(aspect, aspect)
    )
    expected = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC)
    difference = augment(pixels, augmentation)[0].astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("image_size", [(16, 40), (64, 24), (48, 96)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [(1, 1), (0.8, 0.5)])
def test_bicubic_to_another_aspect_equals_pillow(
    augment, shape: tuple[int, int], share: tuple[float, float], image_size: tuple[int, int]
):
    """The result's size changes no draw: asking for the box's own size shows what was cut."""
    pixels = random_pixels(*shape)
    height, width = (round(side * part) for side, part in zip(shape, share, strict=True))
    area, aspect = height * width / (shape[0] * shape[1]), width / height
    settings = {"kind": "random_resized_crop", "scale": (area, area), "ratio": (aspect, aspect)}
    crops = augment(pixels, Augmentation(image_size=(height, width), **settings), 6)
    results = augment(pixels, Augmentation(image_size=image_size, **settings), 6)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (height, width, 3))
    for crop, result in zip(crops, results, strict=True):
        assert (windows == crop).all(axis=(-3, -2, -1)).any()
        expected = Image.fromarray(crop).resize(image_size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(result - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("image_size", [16, 32])
def test_a_square_pair_is_the_number(augment, image_size: int):
    pixels, pair = random_pixels(60, 45), (image_size, image_size)
    for settings in (
        {"kind": "random_resized_crop", "flip": True},
        {"kind": "pad_crop", "flip": True},
    ):
        single, double = (Augmentation(image_size=size, **settings) for size in (image_size, pair))
        assert np.array_equal(augment(pixels, single, 20), augment(pixels, double, 20))
    single = Augmentation("center_crop", image_size, resize=40)
    double = Augmentation("center_crop", pair, resize=(40, 40))
    assert np.array_equal(augment(pixels, single), augment(pixels, double))


@pytest.mark.parametrize("shape", [(64, 64), (100, 75), (41, 96), (37, 71), (20, 90)])
@pytest.mark.parametrize("resize", [(24, 56), (30, 60), (56, 56)])
@pytest.mark.parametrize("transpose", [False, True])
def test_non_square_center_crop_equals_pillow(
    augment, shape: tuple[int, int], resize: tuple[int, int], transpose: bool
):
    """The image keeps its aspect and just covers `resize`; exact fractions decide its shape."""
    shape, resize, size = (pair[::-1] if transpose else pair for pair in (shape, resize, (24, 56)))
    pixels = random_pixels(*shape)
    factor = max(Fraction(wanted, side) for wanted, side in zip(resize, shape, strict=True))
    height, width = (int(side * factor) for side in shape)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    expected = image.crop((left, top, left + size[1], top + size[0]))
    result = augment(pixels, Augmentation("center_crop", size, resize=resize))[0]
    assert np.abs(result - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("shape", [(64, 64), (100, 75), (41, 96)])
def test_center_crop_equals_pillow(augment, shape: tuple[int, int]):
    pixels = random_pixels(*shape)
    height, width = shape
    resized = (40, int(40 * width / height)) if height <= width else (int(40 * height / width), 40)
    image = Image.fromarray(pixels).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (round((side - 32) / 2) for side in resized)
    expected = np.asarray(image.crop((left, top, left + 32, top + 32))).astype(int)
    result = augment(pixels, Augmentation("center_crop", 32, resize=40))[0]
    assert np.abs(result - expected).max() <= 1


@pytest.mark.parametrize(("shape", "image_size"), [((60, 45), 15), ((20, 30), 60)])
def test_area_is_the_mean_over_covered_pixels(augment, shape: tuple[int, int], image_size: int):
    pixels = random_pixels(*shape)
    aspect = shape[1] / shape[0]
    augmentation = Augmentation(
        "random_resized_crop", image_size, (1, 1), (aspect, aspect), interpolation="area"
    )
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    # Whole factors: shrinking is a block mean, enlarging repeats pixels.
    down, up = (shape[0] // image_size, shape[1] // image_size), image_size // shape[0]
    if up:
        expected = tensor.repeat_interleave(up, 2).repeat_interleave(image_size // shape[1], 3)
    else:
        expected = torch.nn.functional.avg_pool2d(tensor, down)
    result = augment(pixels, augmentation)[0].transpose(2, 0, 1)
    assert np.abs(result - expected[0].numpy()).max() <= 1


def test_pad_crop_draws_every_offset_and_nothing_else(augment):
    pixels = random_pixels(8, 8) | 1
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    windows = {
        np.ascontiguousarray(padded[y : y + 8, x : x + 8, :][:, ::step]).tobytes(): (y, x, step)
        for y in range(5)
        for x in range(5)
        for step in (1, -1)
    }
    results = augment(pixels, Augmentation("pad_crop", 8, padding=2, flip=True), 1000)
    counts = Counter(windows[result.tobytes()] for result in results)
    assert len(counts) == 50
    assert min(counts.values()) >= 5 and max(counts.values()) <= 45


def test_non_square_pad_crop_draws_every_offset_and_nothing_else(augment):
    pixels = random_pixels(8, 10) | 1
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    windows = {
        np.ascontiguousarray(padded[y : y + 6, x : x + 12, :][:, ::step]).tobytes(): (y, x, step)
        for y in range(7)
        for x in range(3)
        for step in (1, -1)
    }
    augmentation = Augmentation("pad_crop", (6, 12), padding=2, flip=True)
    counts = Counter(windows[result.tobytes()] for result in augment(pixels, augmentation, 1000))
    assert len(counts) == 42
    assert min(counts.values()) >= 8 and max(counts.values()) <= 45


def test_flip_mirrors_half_of_the_images(augment):
    pixels = random_pixels(28, 40)
    plain = Augmentation("random_resized_crop", 16)
    mirrored = Augmentation("random_resized_crop", 16, flip=True)
    before, after = augment(pixels, plain, 400), augment(pixels, mirrored, 400)
    same = np.array([np.array_equal(a, b) for a, b in zip(before, after, strict=True)])
    flipped = [np.array_equal(a[:, ::-1], b) for a, b in zip(before, after, strict=True)]
    assert np.array_equal(same, ~np.array(flipped))
    assert 160 <= same.sum() <= 240


@pytest.mark.parametrize("image_size", [(64, 64), (32, 64), (64, 16)])
def test_random_resized_crops_have_the_right_area_and_shape(augment, image_size: tuple[int, int]):
    """A gradient image reveals each crop's extent: its value is its position.

    The crop's aspect is that of the settings, whatever aspect it is then resized to.
    """
    size = 256
    ramp = np.zeros((size, size, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(size)[:, None], np.arange(size)
    height, width = image_size
    augmentation = Augmentation(
        "random_resized_crop", image_size, scale=(0.2, 0.6), interpolation="area"
    )
    crops = augment(ramp, augmentation, 2000).astype(float)
    extent_y = (crops[:, -1, 0, 0] - crops[:, 0, 0, 0]) * height / (height - 1)
    extent_x = (crops[:, 0, -1, 1] - crops[:, 0, 0, 1]) * width / (width - 1)
    area, ratio = extent_y * extent_x / size**2, extent_x / extent_y
    assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
    assert abs(area.mean() - 0.4) < 0.01
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.37
    assert abs(np.log(ratio).mean()) < 0.02
    assert crops[:, 0, 0, 0].min() < 8 and crops[:, -1, 0, 0].max() > size - 9


def test_draws_differ_between_seeds(augment):
    pixels = np.asarray(smooth_image(np.random.default_rng(0), 40, 40))
    augmentation = Augmentation("random_resized_crop", 16)
    first, second = augment(pixels, augmentation, 50), augment(pixels, augmentation, 50, seed=1)
    assert np.array_equal(first, augment(pixels, augmentation, 50))
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_disk_cache_notices_a_change_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """numba looks at the entry point's own file only; here a function of another one changes."""
    from data_ffcv.pixels.compiling import compile_cached

    entry, helper = tmp_path / "entry_file.py", tmp_path / "helper_file.py"
    entry.write_text(
        "from helper_file import number\n"
        "def make(sources):\n"
        "    def run():\n"
        "        sources\n"
        "        return number()\n"
        "    return run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def call(number: int) -> tuple[int, int]:
        """Returns the result and the number of compilations, as a fresh process would see them."""
        for name in ("entry_file", "helper_file"):
            sys.modules.pop(name, None)
        helper.write_text(f"import numba\n@numba.njit\ndef number(): return {number}\n")
        importlib.invalidate_caches()
        make = importlib.import_module("entry_file").make
        run = compile_cached(make, str(entry), str(helper))
        return run(), sum(run.stats.cache_misses.values())

    assert [call(1), call(1), call(2), call(2), call(1)] == [(1, 1), (1, 0), (2, 1), (2, 0), (1, 0)]
