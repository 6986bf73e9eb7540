"""Images of a segmentation file with their masks, whole and at the size they are stored in."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.layout import CONVERT, IGNORED
from data_ffcv.beton.verify import read_mask
from data_ffcv.errors import DataError
from data_ffcv.sources.folder_info import FolderInfo
from data_ffcv.splits import shard_indices
from data_ffcv.streams.loader import check_indices
from data_ffcv.streams.pipeline import open_unchanged


class WholeImages:
    """Re-iterable pairs of image and mask, each exactly once over all ranks.

    An image is uint8 [height, width, 3], its mask uint8 [height, width] with 255 for pixels that
    count nowhere; the caller may keep both. Nothing is cut, resized or normalised.

    Attributes:
        info: Of the checked file.
        indices: This rank's samples, in their order.
    """

    def __init__(
        self,
        path: str | Path,
        indices: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Opens a ``.beton`` of ``python -m data_ffcv.convert segmentation``.

        Args:
            path: The file.
            indices: Samples to take; None for all.
            rank: This process.
            world_size: Number of processes.

        Raises:
            DataError: the file is damaged or holds no masks, or an argument is wrong.
        """
        info, images = open_unchanged(Path(path))
        if isinstance(info, FolderInfo) or not info.has_masks:
            raise DataError(
                f"{path} holds no masks; give a .beton that python -m data_ffcv.convert "
                "segmentation made"
            )
        assert isinstance(images, BetonImages)  # as `info` is of a file
        self.info, self._images = info, images
        self.indices = shard_indices(check_indices(self.info, indices), rank, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (image, mask); raises DataError where one is damaged."""
        for index in self.indices.tolist():
            self._images.check_unchanged()
            yield self._read_image(index), self._read_mask(index)

    def _read_image(self, index: int) -> np.ndarray:
        start, _, height, width = self._images.places(np.array([index]))[0].tolist()
        if start < 0:
            return self._images.decode(index)
        raw = self._images.pixels[start : start + 3 * height * width]
        return raw.reshape(height, width, 3).copy()

    def _read_mask(self, index: int) -> np.ndarray:
        mask = read_mask(self.info, self._images, index).copy()
        unknown = mask[(mask >= self.info.num_classes) & (mask != IGNORED)]
        if unknown.size:
            raise DataError(
                f"{self.info.path}: the mask of sample {index} has the class {unknown[0]}, but "
                f"there are {self.info.num_classes}; {CONVERT}"
            )
        return mask
