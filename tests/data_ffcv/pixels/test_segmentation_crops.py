"""Masks follow their images through every kind of crop; the crops of segmentation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_ffcv import Augmentation

Pair = tuple[np.ndarray, np.ndarray]

KINDS = [
    Augmentation("random_resized_crop", (48, 40), interpolation="area", flip=True),
    Augmentation("random_resized_crop", (150, 170), interpolation="area", flip=True),
    Augmentation("pad_crop", (100, 120), padding=8, flip=True),
    Augmentation("center_crop", 64, resize=72, interpolation="area", flip=True),
    Augmentation("random_scale_crop", (64, 80), (0.5, 2.0), interpolation="area", flip=True),
    Augmentation("random_scale_crop", 90, (0.4, 1.1), resize=80, interpolation="area", flip=True),
]


@pytest.fixture(scope="module")
def augment() -> Callable[..., Pair]:
    """augment(image, mask, augmentation, num_draws, seed, **settings) -> (images, masks)."""
    from data_ffcv.pixels.kernels import augment_images, to_settings

    def run(
        image: np.ndarray,
        mask: np.ndarray | None,
        augmentation: Augmentation,
        num_draws: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> Pair:
        """Both lie behind other bytes, as in a file, which may not be written."""
        height, width, _ = image.shape
        labels = b"" if mask is None else mask.tobytes()
        file = np.frombuffer(b"other bytes" + image.tobytes() + labels, np.uint8)
        mask_start = -1 if mask is None else 11 + image.size
        table = np.array([(index, 11, mask_start, height, width) for index in range(num_draws)])
        shape = (num_draws, augmentation.height, augmentation.width)
        images = np.full((*shape, 3), 77, np.uint8)
        masks = np.full(shape if mask is not None else (0, 0, 0), 77, np.uint8)
        numbers = to_settings(augmentation, seed, **settings)
        augment_images(file, file, table, 0, numbers, images, masks)
        return images, masks

    return run


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose red is the row and whose green is the column; blue marks the inside."""
    image = np.full((height, width, 3), 200, np.uint8)
    image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)
    return image


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("augmentation", KINDS, ids=lambda a: f"{a.kind}-{a.image_size}")
def test_mask_pixels_sit_on_their_image_pixels(augment, augmentation: Augmentation, channel: int):
    """The mask holds the coordinates that the image holds, so both must agree everywhere."""
    image = coordinates(110, 130)
    images, masks = augment(image, image[..., channel], augmentation, 60)
    inside = images[..., 2] == 200
    assert inside.any() and np.array_equal(inside, masks != 255)
    assert np.array_equal(images[~inside], np.zeros_like(images[~inside]))
    difference = images[inside][:, channel].astype(int) - masks[inside]
    exact = augmentation.kind == "pad_crop"
    assert np.abs(difference).max() <= (0 if exact else 1)


@pytest.mark.parametrize("augmentation", KINDS, ids=lambda a: f"{a.kind}-{a.image_size}")
def test_a_mask_changes_no_pixel_of_its_image(augment, augmentation: Augmentation):
    pixels = np.random.default_rng(0).integers(0, 256, (110, 130, 3), dtype=np.uint8)
    with_mask, _ = augment(pixels, pixels[..., 0], augmentation, 20)
    without, _ = augment(pixels, None, augmentation, 20)
    assert np.array_equal(with_mask, without)


@pytest.mark.parametrize("size", [(16, 16), (31, 57), (90, 40), (120, 210)])
@pytest.mark.parametrize("shape", [(60, 60), (45, 105), (97, 31), (8, 9)])
@pytest.mark.parametrize("share", [(1, 1), (0.8, 0.5)])
def test_nearest_pixels_equal_pillow(
    augment, shape: tuple[int, int], share: tuple[float, float], size: tuple[int, int]
):
    """The result's size changes no draw: asking for the box's own size shows what was cut."""
    mask = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    image = np.zeros((*shape, 3), np.uint8)
    height, width = (max(1, round(side * part)) for side, part in zip(shape, share, strict=True))
    area, aspect = height * width / (shape[0] * shape[1]), width / height
    settings = {"kind": "random_resized_crop", "scale": (area, area), "ratio": (aspect, aspect)}
    _, crops = augment(image, mask, Augmentation(image_size=(height, width), **settings), 4)
    _, results = augment(image, mask, Augmentation(image_size=size, **settings), 4)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (height, width))
    for crop, result in zip(crops, results, strict=True):
        assert (windows == crop).all(axis=(-2, -1)).any()
        expected = Image.fromarray(crop).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(result, np.asarray(expected))


def test_nearest_pixels_of_a_center_crop_equal_pillow(augment):
    mask = np.random.default_rng(0).integers(0, 255, (97, 61), dtype=np.uint8)
    augmentation = Augmentation("center_crop", 32, resize=40)
    _, result = augment(np.zeros((97, 61, 3), np.uint8), mask, augmentation)
    resized = Image.fromarray(mask).resize((40, int(40 * 97 / 61)), Image.Resampling.NEAREST)
    top, left = round((resized.height - 32) / 2), round((resized.width - 32) / 2)
    assert np.array_equal(result[0], np.asarray(resized)[top : top + 32, left : left + 32])


@pytest.mark.parametrize(
    ("scale", "resize", "shape"),
    [(0.5, None, (50, 35)), (1.5, 20, (43, 30)), (0.8, None, (80, 56))],
)
def test_scaled_image_equals_pillow_and_is_filled_below_and_right(
    augment, scale: float, resize: int | None, shape: tuple[int, int]
):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 70, 3), dtype=np.uint8)
    mask = rng.integers(0, 255, (100, 70), dtype=np.uint8)
    augmentation = Augmentation("random_scale_crop", 90, (scale, scale), resize=resize, flip=True)
    images, masks = augment(pixels, mask, augmentation, 40, fill=(1, 2, 3))
    image = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC)
    nearest = np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
    num_flipped = 0
    for result, labels in zip(images, masks, strict=True):
        flipped = not np.array_equal(labels[: shape[0], : shape[1]], nearest)
        num_flipped += flipped
        step = -1 if flipped else 1
        expected = np.full((90, 90, 3), (1, 2, 3))
        expected[: shape[0], : shape[1]] = np.asarray(image)[:, ::step]
        assert np.abs(result - expected).max() <= 1
        expected = np.full((90, 90), 255)
        expected[: shape[0], : shape[1]] = nearest[:, ::step]
        assert np.array_equal(labels, expected)
    assert 10 <= num_flipped <= 30


def test_windows_and_factors_are_spread_evenly(augment):
    """A window's first and last pixel show the factor, and where it lies in the scaled image."""
    augmentation = Augmentation("random_scale_crop", 40, (0.5, 2.0), interpolation="area")
    images, _ = augment(coordinates(200, 240), None, augmentation, 3000)
    corners = images.astype(float)
    factor = 39 / (corners[:, -1, -1, 0] - corners[:, 0, 0, 0])
    assert 0.48 < factor.min() < 0.53 and 1.9 < factor.max() < 2.1
    assert abs(factor.mean() - 1.25) < 0.03
    free = np.stack([199 - 39 / factor, 239 - 39 / factor], axis=1)
    place = corners[:, 0, 0, :2] / free
    assert np.abs(place.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(place.std(axis=0) - 12**-0.5).max() < 0.02


def draw_uniform(sample: int, draw: int) -> float:
    """The documented generator in plain integers: splitmix64 over seed, epoch, sample and draw."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    key = mix((mix((mix(0) + 0) % 2**64) + sample) % 2**64)
    return (mix((key + (draw + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53


def test_window_is_drawn_again_while_one_class_dominates(augment):
    rng = np.random.default_rng(0)
    mask = np.where(rng.random((60, 50)) < 0.9, 7, 255).astype(np.uint8)
    mask[:14, :14], mask[40:, 30:], mask[20:30] = 3, rng.integers(0, 9, (20, 20)), 255
    augmentation = Augmentation("random_scale_crop", (9, 11), (1, 1), max_class_ratio=0.6)
    _, results = augment(np.zeros((60, 50, 3), np.uint8), mask, augmentation, 300)
    attempts = []
    for sample, result in enumerate(results):
        for attempt in range(10):
            top = int(draw_uniform(sample, 2 + 2 * attempt) * 52)
            left = int(draw_uniform(sample, 3 + 2 * attempt) * 40)
            window = mask[top : top + 9, left : left + 11]
            counts = np.unique(window[window != 255], return_counts=True)[1]
            if counts.size and counts.max() / counts.sum() <= 0.6:
                break
        assert np.array_equal(result, window)
        attempts.append(attempt)
    assert set(attempts) == set(range(10))


def test_views_differ_and_view_0_is_the_stream_itself(augment):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    augmentation = Augmentation("random_resized_crop", 16, flip=True)
    plain, first, second, third = (
        augment(pixels, None, augmentation, 50, **settings)[0]
        for settings in ({}, {"view": 0}, {"view": 1}, {"view": 2})
    )
    assert np.array_equal(plain, first)
    for one, other in ((first, second), (first, third), (second, third)):
        assert not any(np.array_equal(a, b) for a in one for b in other)
