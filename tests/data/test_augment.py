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
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("ratio", (2.0, 1.0)),
        ("padding", -1),
        ("interpolation", "nearest"),
        ("resize", 64),
    ],
)
def test_bad_setting_is_named(setting: str, value: Any):
    with pytest.raises(DataError, match=setting):
        Augmentation(**{**GOOD, setting: value})


@pytest.mark.parametrize(
    ("augmentation", "mend"),
    [
        (Augmentation("pad_crop", 64, padding=4), "padding"),
        (Augmentation("center_crop", 32), "resize"),
    ],
)
def test_images_smaller_than_the_crop_are_refused(
    grey_beton: Path, augmentation: Augmentation, mend: str
):
    with pytest.raises(DataError, match=mend):
        augmentation.check_fits(inspect_beton(grey_beton))
