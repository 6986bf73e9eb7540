"""Where pixels come from: a mapped ``.beton`` file, or a folder of image files."""

from typing import Protocol

import numpy as np

from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.info import BetonInfo
from data_ffcv.sources.folder_info import FolderInfo, ImagesInfo

_NO_BYTES = np.empty(0, np.uint8)


class StoredImages(Protocol):
    """Samples that can be decoded, by any number of threads.

    Attributes:
        pixels: uint8, the mapped file, in which raw images lie.
        masks: uint8, the mapped file, in which segmentation masks lie.
    """

    pixels: np.ndarray
    masks: np.ndarray

    def check_unchanged(self) -> None:
        """Looks whether what was opened is still there; to be called before each batch.

        Raises:
            DataError: it is not.
        """

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


class FolderImages:
    """The images of a folder of class folders, decoded from their files."""

    def __init__(self, info: FolderInfo) -> None:
        self._info = info
        self.pixels = self.masks = _NO_BYTES

    def check_unchanged(self) -> None:
        """Each image is a file of its own, which `decode` opens."""

    def places(self, indices: np.ndarray) -> np.ndarray:
        table = np.full((len(indices), 4), -1, np.int64)
        table[:, 2:] = 0
        return table

    def decode(self, index: int) -> np.ndarray:
        return self._info.read(index)


def open_images(info: ImagesInfo) -> StoredImages:
    """Returns where the pixels of a checked file or folder come from."""
    return BetonImages(info) if isinstance(info, BetonInfo) else FolderImages(info)
