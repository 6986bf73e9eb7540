"""What is done to each image between the file and the batch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_ffcv.errors import DataError
from data_ffcv.sources.folder_info import ImagesInfo

KINDS = ("random_resized_crop", "pad_crop", "center_crop", "random_scale_crop")
INTERPOLATIONS = ("bicubic", "area")
_NUMBER = r"\d+(\.\d+)?"
_AUTO_AUGMENT = re.compile(  # what timm's rand_augment_transform takes
    rf"(rand(-(m\d+|n[1-9]\d*|p{_NUMBER}|mstd{_NUMBER}|mmax[1-9]\d*|inc[01]|t(weights|3a|3aw)))*)?"
)


@dataclass(frozen=True)
class Augmentation:
    """One crop, one resize, at most one flip, and what is done to colours after them.

    A segmentation mask is cropped, resized (nearest pixel) and flipped with its image.

    Attributes:
        kind: ``random_resized_crop`` (MAE pretraining), ``pad_crop`` (pad with black, then cut
            a random window; the usual CIFAR augmentation), ``center_crop`` (evaluation) or
            ``random_scale_crop`` (segmentation: resize by a random factor in the image's own
            aspect, cut a random window, fill below and to the right what is missing).
        image_size: Height and width of the result in pixels, or the side of a square.
        scale: Area of a ``random_resized_crop`` relative to the image, (smallest, largest);
            or the factor of ``random_scale_crop`` relative to `resize`.
        ratio: Width divided by height of a random crop before it is resized to `image_size`,
            (smallest, largest).
        padding: Pixels added on each side by ``pad_crop``.
        flip: Mirror left to right with probability one half.
        interpolation: ``bicubic`` (antialiased, a = -0.5, as Pillow) or ``area`` (mean over
            the covered pixels, as OpenCV's INTER_AREA; faster).
        resize: Height and width that an image, resized in its own aspect, just covers before
            ``center_crop`` cuts or ``random_scale_crop`` applies its factor; an int is the length
            of its shorter side. None keeps the size.
        max_class_ratio: ``random_scale_crop`` draws up to ten windows until no class has a larger
            share of the labelled pixels than this; 1 takes the first.
        auto_augment: RandAugment as timm writes it, ``rand-m9-mstd0.5-inc1``; "" for none.
        color_jitter: Largest change of brightness, contrast, saturation and hue; None for none.
        color_jitter_prob: Probability of the colour jitter.
        grayscale_prob: Probability of losing the colours.
        gaussian_blur_prob: Probability of a Gaussian blur with a radius in `gaussian_blur_sigma`.
        gaussian_blur_sigma: Deviation of the blur in pixels, (smallest, largest).
        solarize_prob: Probability of inverting all values of 128 and more.
        random_erasing_prob: Probability of overwriting one rectangle with Gaussian noise, after
            the normalisation (Zhong et al. 2020, as MAE fine-tunes).

    Raises:
        DataError: a value is out of range.
    """

    kind: Literal["random_resized_crop", "pad_crop", "center_crop", "random_scale_crop"]
    image_size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = False
    interpolation: Literal["bicubic", "area"] = "bicubic"
    resize: int | tuple[int, int] | None = None
    max_class_ratio: float = 1.0
    auto_augment: str = ""
    color_jitter: tuple[float, float, float, float] | None = None
    color_jitter_prob: float = 1.0
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    gaussian_blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0
    random_erasing_prob: float = 0.0

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, f"kind must be one of {KINDS}, got {self.kind!r}")
        _require(
            self.interpolation in INTERPOLATIONS,
            f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}",
        )
        _require(
            _is_size(self.image_size),
            f"image_size must be positive, one number or (height, width), got {self.image_size}",
        )
        largest = math.inf if self.kind == "random_scale_crop" else 1
        for name, bound in (
            ("scale", largest),
            ("ratio", math.inf),
            ("gaussian_blur_sigma", math.inf),
        ):
            value = getattr(self, name)
            _require(
                isinstance(value, Sequence)
                and len(value) == 2
                and 0 < value[0] <= value[1] <= bound,
                f"{name} must be two numbers with 0 < low <= high <= {bound}, got {value}",
            )
        _require(isinstance(self.flip, bool), f"flip must be True or False, got {self.flip!r}")
        _require(self.padding >= 0, f"padding must not be negative, got {self.padding}")
        self._check_resize()
        self._check_colours()

    def _check_resize(self) -> None:
        _require(
            self.resize is None or _is_size(self.resize),
            f"resize must be positive, one number or (height, width), got {self.resize}",
        )
        covers = self.kind == "random_scale_crop" or (
            self.kind == "center_crop" and (self.resize is None or self._covers(self.resize))
        )
        _require(
            self.resize is None or covers,
            f"resize is for random_scale_crop, and for center_crop when it is at least image_size "
            f"({self.image_size}), got {self.resize} with {self.kind}",
        )
        _require(
            0 < self.max_class_ratio <= 1,
            f"max_class_ratio must be in (0, 1], got {self.max_class_ratio}",
        )
        _require(
            self.max_class_ratio == 1 or self.kind == "random_scale_crop",
            f"max_class_ratio is for random_scale_crop, not for {self.kind}",
        )

    def _check_colours(self) -> None:
        for name in (name for name in vars(self) if name.endswith("_prob")):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        _require(
            _AUTO_AUGMENT.fullmatch(self.auto_augment) is not None,
            "auto_augment must be rand with sections such as -m9, -n2, -p0.5, -mstd0.5, -mmax10, "
            f"-inc1 or -tweights, got {self.auto_augment!r}",
        )
        jitter = self.color_jitter
        _require(
            jitter is None or (len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5),
            "color_jitter must be four numbers (brightness, contrast, saturation, hue), none "
            f"negative and hue at most 0.5, got {jitter}",
        )

    @property
    def changes_colours(self) -> bool:
        """Whether anything but geometry and random erasing is done to the pixels."""
        jitters = self.color_jitter is not None and self.color_jitter_prob > 0
        probs = (self.grayscale_prob, self.gaussian_blur_prob, self.solarize_prob)
        return bool(self.auto_augment) or jitters or any(probs)

    @property
    def height(self) -> int:
        """Height of the result, in pixels."""
        return to_pair(self.image_size)[0]

    @property
    def width(self) -> int:
        """Width of the result, in pixels."""
        return to_pair(self.image_size)[1]

    def check_fits(self, info: ImagesInfo) -> None:
        """Raises DataError when some image of the file is too small to be cut."""
        if self.kind == "pad_crop":
            border, fix = 2 * self.padding, "raise padding"
        elif self.kind == "center_crop" and self.resize is None:
            border, fix = 0, f"set resize to {self.image_size} or more"
        else:
            return  # crops that are resized or filled fit any image
        sides = (("high", info.min_height, self.height), ("wide", info.min_width, self.width))
        for name, smallest, needed in sides:
            _require(
                smallest + border >= needed,
                f"{info.path} holds an image only {smallest} pixels {name}, too small for "
                f"{self.kind} to {self.image_size}; {fix}",
            )

    def _covers(self, resize: int | tuple[int, int]) -> bool:
        height, width = to_pair(resize)
        return height >= self.height and width >= self.width


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width); one number is the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _is_size(size: int | tuple[int, int]) -> bool:
    return size >= 1 if isinstance(size, int) else len(size) == 2 and min(size) >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)
