"""Augmentation settings are refused with the name of the setting."""

from pathlib import Path
from typing import Any

import pytest

from data_ffcv import Augmentation, DataError, inspect_beton

GOOD: dict[str, Any] = {"kind": "random_resized_crop", "image_size": 32}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kind", "crop"),
        ("image_size", 0),
        ("image_size", (32, 0)),
        ("image_size", (32, 32, 3)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", 3),
        ("flip", "yes"),
        ("ratio", (2.0, 1.0)),
        ("padding", -1),
        ("interpolation", "nearest"),
        ("resize", 64),
        ("max_class_ratio", 0.75),
        ("auto_augment", "rand-x9"),
        ("auto_augment", "augmix-m5"),
        ("color_jitter", (0.4, 0.4, 0.4)),
        ("color_jitter", (0.4, 0.4, 0.4, 0.6)),
        ("color_jitter_prob", 1.5),
        ("grayscale_prob", -0.1),
        ("gaussian_blur_sigma", (2.0, 0.1)),
        ("random_erasing_prob", 2.0),
    ],
)
def test_bad_setting_is_named(setting: str, value: Any):
    with pytest.raises(DataError, match=setting):
        Augmentation(**{**GOOD, setting: value})


@pytest.mark.parametrize("resize", [0, 47, (31, 48), (32, 47), (32, 48, 3)])
def test_resize_below_either_side_is_refused(resize: int | tuple[int, int]):
    with pytest.raises(DataError, match="resize"):
        Augmentation("center_crop", (32, 48), resize=resize)
    Augmentation("center_crop", (32, 48), resize=(32, 48))


@pytest.mark.parametrize(
    ("augmentation", "fix"),
    [
        (Augmentation("pad_crop", 64, padding=4), "padding"),
        (Augmentation("center_crop", 32), "resize"),
        (Augmentation("pad_crop", (36, 37), padding=4), "only 28 pixels wide.*padding"),
        (Augmentation("center_crop", (29, 28)), "only 28 pixels high.*resize"),
        (Augmentation("center_crop", (28, 29)), "only 28 pixels wide.*resize"),
    ],
)
def test_images_smaller_than_the_crop_are_refused(
    grey_beton: Path, augmentation: Augmentation, fix: str
):
    with pytest.raises(DataError, match=fix):
        augmentation.check_fits(inspect_beton(grey_beton))


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation("pad_crop", (36, 20), padding=4),
        Augmentation("center_crop", (12, 28)),
        Augmentation("center_crop", (64, 200), resize=200),
        Augmentation("random_resized_crop", (64, 200)),
    ],
)
def test_images_as_large_as_the_crop_are_accepted(grey_beton: Path, augmentation: Augmentation):
    augmentation.check_fits(inspect_beton(grey_beton))
