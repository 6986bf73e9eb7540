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
            a random window; the usual CIFAR augmentation) or ``center_crop`` (evaluation).
        image_size: Height and width of the result in pixels, or the side of a square.
        scale: Area of a random crop relative to the image, (smallest, largest).
        ratio: Width divided by height of a random crop before it is resized to `image_size`,
            (smallest, largest).
        padding: Pixels added on each side by ``pad_crop``.
        flip: Mirror left to right with probability one half.
        interpolation: ``bicubic`` (antialiased, a = -0.5, as Pillow) or ``area`` (mean over
            the covered pixels, as OpenCV's INTER_AREA; faster).
        resize: Height and width that an image, resized in its own aspect, just covers before
            ``center_crop`` cuts; an int is the length of its shorter side. None keeps the size.

    Raises:
        DataError: a value is out of range.
    """

    kind: Literal["random_resized_crop", "pad_crop", "center_crop"]
    image_size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = False
    interpolation: Literal["bicubic", "area"] = "bicubic"
    resize: int | tuple[int, int] | None = None

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
        low, high = self.scale
        _require(0 < low <= high <= 1, f"scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        low, high = self.ratio
        _require(0 < low <= high, f"ratio must satisfy 0 < low <= high, got {self.ratio}")
        _require(self.padding >= 0, f"padding must not be negative, got {self.padding}")
        _require(
            self.resize is None or _is_size(self.resize),
            f"resize must be positive, one number or (height, width), got {self.resize}",
        )
        _require(
            self.resize is None or (self.kind == "center_crop" and self._covers(self.resize)),
            f"resize is for center_crop and at least image_size ({self.image_size}), "
            f"got {self.resize} with {self.kind}",
        )

    @property
    def height(self) -> int:
        """Height of the result, in pixels."""
        return to_pair(self.image_size)[0]

    @property
    def width(self) -> int:
        """Width of the result, in pixels."""
        return to_pair(self.image_size)[1]

    def check_fits(self, info: BetonInfo) -> None:
        """Raises DataError when some image of the file is too small to be cut."""
        if self.kind == "pad_crop":
            border, mend = 2 * self.padding, "raise padding"
        elif self.kind == "center_crop" and self.resize is None:
            border, mend = 0, f"set resize to {self.image_size} or more"
        else:
            return
        sides = (("high", info.min_height, self.height), ("wide", info.min_width, self.width))
        for name, smallest, needed in sides:
            _require(
                smallest + border >= needed,
                f"{info.path} holds an image only {smallest} pixels {name}, too small for "
                f"{self.kind} to {self.image_size}; {mend}",
            )

    def _covers(self, resize: int | tuple[int, int]) -> bool:
        height, width = to_pair(resize)
        return height >= self.height and width >= self.width


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width); one number is the side of a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _is_size(size: int | tuple[int, int]) -> bool:
    pair = to_pair(size)
    return len(pair) == 2 and min(pair) >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)
