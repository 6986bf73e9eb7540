"""Fills batches: decodes, augments and labels samples in a pool of threads that the stream owns.

numba's parallel loops would need a threading layer that survives several loaders at once
(workqueue aborts, OpenMP dies after a fork, TBB may hang at exit) and would compile for every
loader.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import NamedTuple

import numpy as np

from data_ffcv.beton.layout import IGNORED
from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation
from data_ffcv.pixels.colours import Colours
from data_ffcv.pixels.images import StoredImages
from data_ffcv.pixels.kernels import augment_images, to_settings
from data_ffcv.pixels.normalise import normalise_pixels
from data_ffcv.pixels.scaling import Scaling
from data_ffcv.sources.folder_info import ImagesInfo

_BYTES_TOGETHER = 1 << 20  # of images between two stages: few enough to stay in a core's cache
_NO_MASKS = np.empty((0, 0, 0), np.uint8)


class Array(NamedTuple):
    """One array of a batch: shape of a sample's part, and type."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Decoder:
    """Turns sample numbers into the arrays of a batch.

    They are one array of images for each view, uint8 [n, height, width, 3], or normalised float32
    [n, 3, height, width] with a `scaling`; then the labels, int64 [n], or the masks of the first
    view, uint8 [n, height, width].

    Attributes:
        arrays: What these arrays are, in this order.
    """

    def __init__(
        self,
        images: StoredImages,
        info: ImagesInfo,
        views: Sequence[Augmentation],
        *,
        seed: int,
        fill: tuple[int, int, int],
        num_workers: int,
        scaling: Scaling | None,
    ) -> None:
        """Starts no thread yet.

        Args:
            images: Where the pixels come from.
            info: Of these images.
            views: What is done to each image, once for each view.
            seed: Of this stream alone; decides crops, flips and colours.
            fill: Colour of what lies outside an image, three values in 0 ... 255.
            num_workers: Number of threads.
            scaling: Of `scaling.to_scaling`, to normalise; None leaves images as bytes.
        """
        self._images, self._info, self._views, self._scaling = images, info, views, scaling
        self._settings = [to_settings(a, seed, v, fill) for v, a in enumerate(views)]
        self._colours = [
            Colours(a, seed, v) if a.changes_colours else None for v, a in enumerate(views)
        ]
        self._num_workers = num_workers
        self._workers = workers = set[int]()
        self._pool = ThreadPoolExecutor(
            num_workers, "decode", initializer=lambda: workers.add(get_ident())
        )
        self.arrays = [self._view_array(view) for view in views]
        target = Array((), np.dtype(np.int64))
        if info.has_masks:
            target = Array((views[0].height, views[0].width), np.dtype(np.uint8))
        self.arrays.append(target)

    def decode(self, epoch: int, indices: np.ndarray, batch: Sequence[np.ndarray]) -> None:
        """Fills the arrays of a batch, each worker one consecutive run of it.

        Raises:
            DataError: a sample is corrupt, or the file has been written over.
        """
        self._images.check_unchanged()
        *_, targets = batch
        if self._info.labels is not None:
            targets[:] = self._info.labels[indices]
        bounds = np.linspace(0, len(indices), self._num_workers + 1).astype(int)
        runs = [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        jobs = [self._pool.submit(self._decode_run, epoch, indices, batch, run) for run in runs]
        for job in jobs:
            job.result()

    def runs_here(self) -> bool:
        """Whether the calling thread is one of this decoder's."""
        return get_ident() in self._workers

    def close(self, wait: bool) -> None:
        """Ends the threads, after what they are at."""
        self._pool.shutdown(wait=wait)

    def _view_array(self, view: Augmentation) -> Array:
        if self._scaling is None:
            return Array((view.height, view.width, 3), np.dtype(np.uint8))
        return Array((3, view.height, view.width), np.dtype(np.float32))

    def _decode_run(
        self, epoch: int, indices: np.ndarray, batch: Sequence[np.ndarray], run: slice
    ) -> None:
        *views, targets = batch
        step = max(1, _BYTES_TOGETHER // max(3 * v.height * v.width for v in self._views))
        for start in range(run.start, run.stop, step):
            part = slice(start, min(start + step, run.stop))
            masks = targets[part] if self._info.has_masks else _NO_MASKS
            self._decode_part(epoch, indices[part], [view[part] for view in views], masks)
            self._check_masks(indices[part], masks)

    def _decode_part(
        self, epoch: int, indices: np.ndarray, outs: list[np.ndarray], masks: np.ndarray
    ) -> None:
        bytes_out = outs
        if self._scaling is not None:
            sizes = [(len(indices), view.height, view.width, 3) for view in self._views]
            bytes_out = [np.empty(size, np.uint8) for size in sizes]
        self._augment(epoch, indices, bytes_out, masks)
        for view, colours in zip(bytes_out, self._colours, strict=True):
            if colours is not None:
                for pixels, index in zip(view, indices, strict=True):
                    colours(pixels, epoch, int(index))
        if self._scaling is not None:
            for view, out in zip(bytes_out, outs, strict=True):
                normalise_pixels(view, *self._scaling, out)

    def _check_masks(self, indices: np.ndarray, masks: np.ndarray) -> None:
        unknown = (masks >= self._info.num_classes) & (masks != IGNORED)
        if unknown.any():
            sample = indices[unknown.any(axis=(1, 2)).argmax()]
            raise DataError(
                f"{self._info.path}: the mask of sample {sample} has the class "
                f"{masks[unknown][0]}, but there are {self._info.num_classes}; convert the file "
                "again"
            )

    def _augment(
        self, epoch: int, indices: np.ndarray, outs: list[np.ndarray], masks: np.ndarray
    ) -> None:
        images = self._images
        table = np.concatenate([indices[:, None], images.places(indices)], axis=1)
        in_file = table[:, 1] >= 0
        if in_file.all():
            self._augment_rows(images.pixels, table, epoch, outs, masks)
            return
        for n, index in enumerate(indices):
            row, pixels = table[n : n + 1], images.pixels
            if not in_file[n]:
                image = images.decode(int(index))
                row[0, 1], row[0, 3:] = 0, image.shape[:2]
                pixels = image.reshape(-1)
            one = slice(n, n + 1)
            self._augment_rows(pixels, row, epoch, [out[one] for out in outs], masks[one])

    def _augment_rows(
        self,
        pixels: np.ndarray,
        table: np.ndarray,
        epoch: int,
        outs: list[np.ndarray],
        masks: np.ndarray,
    ) -> None:
        for settings, out in zip(self._settings, outs, strict=True):
            augment_images(pixels, self._images.masks, table, epoch, settings, out, masks)
            masks = _NO_MASKS  # those of the first view only
