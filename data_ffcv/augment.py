"""What is done to each image between the file and the batch."""

from dataclasses import dataclass
from typing import Literal

from data_ffcv.beton import BetonInfo
from data_ffcv.errors import DataError

KINDS = ("random_resized_crop", "pad_crop", "center_crop")
INTERPOLATIONS = ("bicubic", "area")


@dataclass(frozen=True)
class Augmentation:
    """One crop, one resize and at most one flip, the same for every image of a stream.

    Attributes:
        kind: ``random_resized_crop`` (MAE pretraining), ``pad_crop`` (pad with black, then cut
            a random square; the usual CIFAR augmentation) or ``center_crop`` (evaluation).
        image_size: Height and width of the result, in pixels.
        scale: Area of a random crop relative to the image, (smallest, largest).
        ratio: Width divided by height of a random crop, (smallest, largest).
        padding: Pixels added on each side by ``pad_crop``.
        flip: Mirror left to right with probability one half.
        interpolation: ``bicubic`` (antialiased, a = -0.5, as Pillow) or ``area`` (mean over
            the covered pixels, as OpenCV's INTER_AREA; faster).
        resize: Length of the shorter side before ``center_crop`` cuts; None keeps the size.

    Raises:
        DataError: a value is out of range.
    """

    kind: Literal["random_resized_crop", "pad_crop", "center_crop"]
    image_size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = False
    interpolation: Literal["bicubic", "area"] = "bicubic"
    resize: int | None = None

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, f"kind must be one of {KINDS}, got {self.kind!r}")
        _require(
            self.interpolation in INTERPOLATIONS,
            f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}",
        )
        _require(self.image_size >= 1, f"image_size must be positive, got {self.image_size}")
        low, high = self.scale
        _require(0 < low <= high <= 1, f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        low, high = self.ratio
        _require(0 < low <= high, f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        _require(self.padding >= 0, f"padding must not be negative, got {self.padding}")
        _require(
            self.resize is None or (self.kind == "center_crop" and self.resize >= self.image_size),
            f"resize is for center_crop and at least image_size ({self.image_size}), "
            f"got {self.resize} with {self.kind}",
        )

    def check_fits(self, info: BetonInfo) -> None:
        """Raises DataError when some image of the file is too small to be cut."""
        if self.kind == "pad_crop":
            needed, mend = self.image_size - 2 * self.padding, "raise padding"
        elif self.kind == "center_crop" and self.resize is None:
            needed, mend = self.image_size, f"set resize to {self.image_size} or more"
        else:
            return
        smallest = min(info.min_height, info.min_width)
        _require(
            smallest >= needed,
            f"{info.path} holds an image with a side of {smallest} pixels, too small for "
            f"{self.kind} to {self.image_size}; {mend}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)
