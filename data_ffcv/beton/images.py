"""The images of a mapped ``.beton`` file."""

import os
import weakref

import numpy as np
import simplejpeg

from data_ffcv.beton.info import BetonInfo, file_version
from data_ffcv.beton.layout import RAW
from data_ffcv.errors import DataError


class BetonImages:
    """The images of a checked ``.beton``.

    The file stays open, and the mapping stays valid when another file is renamed over it.
    Truncating it in place between `check_unchanged` and the end of a batch kills the process
    (SIGBUS), as with any mapped file.
    """

    def __init__(self, info: BetonInfo) -> None:
        self._info = info
        self.file = info.path.open("rb")
        weakref.finalize(self, self.file.close)
        mapped = np.memmap(self.file, np.uint8, mode="r")
        self.pixels = self.masks = mapped.view(np.ndarray)

    def check_unchanged(self) -> None:
        path, before = self._info.path, len(self.pixels)
        try:
            now = os.fstat(self.file.fileno()).st_size
        except OSError as error:  # such as a file server that has forgotten it
            raise DataError(
                f"{path} cannot be read any more ({error.strerror}); put it back, and never write "
                "over a file in use but rename the new one over it"
            ) from error
        if now != before:
            change = "shrunk" if now < before else "grown"
            raise DataError(
                f"{path} has {change} from {before} to {now} bytes while it was read; put the "
                "whole file back, and never write over a file in use but rename the new one over it"
            )

    @property
    def is_inspected(self) -> bool:
        """Whether the mapped file is the very one that was inspected."""
        return self._info.version == file_version(os.fstat(self.file.fileno()))

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
            # A damaged header may ask for any amount of memory, so it is looked at first.
            if simplejpeg.decode_jpeg_header(content)[:2] != self._shape(index):
                raise ValueError("it has another size")
            pixels: np.ndarray = simplejpeg.decode_jpeg(content, "RGB")
        except ValueError as error:
            raise DataError(
                f"{self._info.path}: the JPEG data of sample {index} is corrupt ({error}); "
                "convert the file again"
            ) from error
        return pixels

    def _shape(self, index: int) -> tuple[int, int]:
        samples = self._info.samples
        return int(samples.heights[index]), int(samples.widths[index])
