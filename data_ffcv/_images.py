"""Where pixels come from: a mapped ``.beton`` file, or a folder of image files."""

from typing import Protocol

import numpy as np
import simplejpeg

from data_ffcv.beton import RAW, BetonInfo
from data_ffcv.errors import DataError
from data_ffcv.folder import FolderInfo, ImagesInfo

_NO_BYTES = np.empty(0, np.uint8)


class Images(Protocol):
    """Samples that can be decoded, by any number of threads.

    Attributes:
        pixels: uint8, the mapped file, in which raw images lie.
        masks: uint8, the mapped file, in which segmentation masks lie.
    """

    pixels: np.ndarray
    masks: np.ndarray

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Returns int64 [n, 4]: position in `pixels` or -1, in `masks` or -1, height, width.

        -1 for an image that `decode` has to be asked for, and where there is no mask. Such an
        image's size may be 0, if only its decoding tells.
        """

    def decode(self, index: int) -> np.ndarray:
        """Returns one image, uint8 [height, width, 3].

        Raises:
            DataError: it is corrupt or cannot be read.
        """


class BetonImages:
    """The images of a checked ``.beton``.

    The mapping stays valid when the file is replaced by renaming another one over it. Truncating
    or rewriting it in place would kill the process (SIGBUS), as with any mapped file.
    """

    def __init__(self, info: BetonInfo) -> None:
        self._info = info
        mapped = np.memmap(info.path, np.uint8, mode="r")
        self.pixels = self.masks = mapped.view(np.ndarray)

    def places(self, indices: np.ndarray) -> np.ndarray:
        samples = self._info.samples
        table = np.full((len(indices), 4), -1, np.int64)
        raw = samples.modes[indices] == RAW
        table[raw, 0] = samples.pointers[indices[raw]]
        if samples.mask_pointers is not None:
            table[:, 1] = samples.mask_pointers[indices]
        table[:, 2], table[:, 3] = samples.heights[indices], samples.widths[indices]
        return table

    def decode(self, index: int) -> np.ndarray:
        samples = self._info.samples
        start = int(samples.pointers[index])
        content = self.pixels[start : start + int(samples.num_bytes[index])]
        try:
            pixels = simplejpeg.decode_jpeg(content, "RGB")
        except ValueError as error:
            raise DataError(
                f"{self._info.path}: the JPEG data of sample {index} is corrupt ({error}); "
                "convert the file again"
            ) from error
        if pixels.shape[:2] != (samples.heights[index], samples.widths[index]):
            raise DataError(
                f"{self._info.path}: sample {index} has another size than its JPEG data; "
                "convert the file again"
            )
        return pixels


class FolderImages:
    """The images of a folder of class folders, decoded from their files."""

    def __init__(self, info: FolderInfo) -> None:
        self._info = info
        self.pixels = self.masks = _NO_BYTES

    def places(self, indices: np.ndarray) -> np.ndarray:
        table = np.full((len(indices), 4), -1, np.int64)
        table[:, 2:] = 0
        return table

    def decode(self, index: int) -> np.ndarray:
        return self._info.read(index)


def open_images(info: ImagesInfo) -> Images:
    """Returns where the pixels of a checked file or folder come from."""
    return BetonImages(info) if isinstance(info, BetonInfo) else FolderImages(info)
