"""How one sample is stored in a ``.beton`` file: its size, pixels or JPEG, and its mask."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import simplejpeg
from PIL import Image

from data_ffcv.beton.layout import JPG, RAW
from data_ffcv.errors import DataError
from data_ffcv.sources import Sample

WriteMode = Literal["raw", "jpg", "proportion", "smart"]
WRITE_MODES = get_args(WriteMode)
_LARGEST_PAGE = 1 << 31  # the header has 32 bits for it
_LARGEST_SIDE = (1 << 16) - 1
_SMART_BYTES = 128 * 128 * 3  # write mode "smart": larger images are stored as JPEG


class Encoded(NamedTuple):
    """A sample as it is stored: pixels or JPEG, and the mask's pixels, uint8 [num_bytes]."""

    mode: int
    height: int
    width: int
    image: np.ndarray
    mask: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """What it takes in the file; must not cross a page."""
        return self.image.nbytes + (0 if self.mask is None else self.mask.nbytes)


@dataclass(frozen=True)
class Encoding:
    """How samples are stored.

    Attributes:
        write_mode: ``raw``, ``jpg``, ``proportion`` or ``smart``.
        jpeg_quality: 1 to 100; colours at half resolution (4:2:0).
        compress_probability: Share of JPEG images in write mode ``proportion``.
        shortest_side: Shrink images so that the shorter side is at most this; None: do not.
        longest_side: The same for the longer side.
        seed: Decides which images ``proportion`` compresses.

    Raises:
        DataError: a value is out of range.
    """

    write_mode: WriteMode = "raw"
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    shortest_side: int | None = None
    longest_side: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.write_mode in WRITE_MODES,
            f"write_mode must be one of {', '.join(WRITE_MODES)}, got {self.write_mode!r}",
        )
        require(
            1 <= self.jpeg_quality <= 100,
            f"jpeg_quality must be in [1, 100], got {self.jpeg_quality}",
        )
        require(
            0 <= self.compress_probability <= 1,
            f"compress_probability must be in [0, 1], got {self.compress_probability}",
        )
        for name in ("shortest_side", "longest_side"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be positive, got {value}")
        require(
            self.shortest_side is None or self.longest_side is None,
            "shortest_side and longest_side exclude each other; give one of them",
        )
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")

    def encode(self, sample: Sample, index: int) -> Encoded:
        """Returns sample number `index` as it is stored.

        Raises:
            ValueError: the sample cannot be stored; the message says why.
        """
        size = self._size(sample.image.size)
        pixels = np.asarray(_resize(sample.image, size, Image.Resampling.BICUBIC))
        mask = None
        if sample.mask is not None:
            mask = np.asarray(_resize(sample.mask, size, Image.Resampling.NEAREST)).reshape(-1)
        mode = JPG if self._compresses(pixels, index) else RAW
        image = self._to_jpeg(pixels) if mode == JPG else pixels.reshape(-1)
        height, width = pixels.shape[:2]
        encoded = Encoded(mode, height, width, image, mask, sample.notes)
        if max(height, width) > _LARGEST_SIDE or encoded.num_bytes > _LARGEST_PAGE:
            raise ValueError(f"{width}x{height} pixels are too many; pass --longest_side 1024")
        return encoded

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.shortest_side:
            scale = self.shortest_side / min(size)
        elif self.longest_side:
            scale = self.longest_side / max(size)
        else:
            return size
        width, height = size
        return (round(width * scale) or 1, round(height * scale) or 1) if scale < 1 else size

    def _compresses(self, pixels: np.ndarray, index: int) -> bool:
        if self.write_mode == "proportion":
            draw = np.random.default_rng([self.seed, index]).random()
            return bool(draw < self.compress_probability)
        smart = self.write_mode == "smart" and pixels.nbytes > _SMART_BYTES
        return smart or self.write_mode == "jpg"

    def _to_jpeg(self, pixels: np.ndarray) -> np.ndarray:
        jpeg = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), self.jpeg_quality, "RGB", "420", fastdct=False
        )
        return np.frombuffer(jpeg, np.uint8)


def _resize(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    if image.size == size:
        return image
    # Averaging blocks of pixels first is quicker and, with this gap, as good (Pillow's manual).
    gap = 3.0 if how == Image.Resampling.BICUBIC else None
    return image.resize(size, how, reducing_gap=gap)


def require(condition: bool, message: str) -> None:
    """Raises DataError with the message unless the condition holds."""
    if not condition:
        raise DataError(message)
