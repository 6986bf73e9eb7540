"""From sample numbers to tensors on the device: what streams and evaluation loaders share."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_ffcv.beton.images import BetonImages
from data_ffcv.errors import DataError
from data_ffcv.pixels.images import StoredImages, open_images
from data_ffcv.pixels.scaling import move_scaling, normalise_tensor, to_scaling
from data_ffcv.sources.folder_info import ImagesInfo, inspect_images
from data_ffcv.streams.settings import LoaderSettings, choose_backend

if TYPE_CHECKING:
    from data_ffcv.streams.batches import BatchPlan, LoadedBatch, PlannedBatches

logger = logging.getLogger(__name__)

_NUM_TRIES = 10  # each lost to a file that is renamed over the one just checked

# Images of each view, float32 [batch_size, 3, height, width], then labels, int64 [batch_size], or
# masks, int64 [batch_size, height, width] with 255 for pixels to be ignored.
Batch = tuple[torch.Tensor, ...]


class Pipeline:
    """Images of a file or folder, what is done to them, and the backend that does it.

    Attributes:
        settings: What is done to the images.
        backend: ``ffcv`` or ``threads``.
        info: What the file or folder holds.
    """

    def __init__(self, path: str | Path, settings: LoaderSettings) -> None:
        """Opens the images and starts no thread yet.

        Raises:
            DataError: the file is damaged, or the settings are not for it.
        """
        self.settings = settings
        self.backend = choose_backend(settings.backend, Path(path))
        self.info, self._images = open_unchanged(Path(path))
        for view in settings.views:
            view.check_fits(self.info)
        self._num_workers = _usable_workers(settings.num_workers)
        self._device = torch.device(settings.device)
        self._scaling = to_scaling(settings.mean, settings.std)
        self._device_scaling = move_scaling(self._scaling, self._device)
        self._copied: torch.cuda.Event | None = None

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    def start(self, plan: Iterator["BatchPlan"]) -> "PlannedBatches":
        """Starts loading the planned batches."""
        from data_ffcv.pixels.decoder import Decoder
        from data_ffcv.streams.batches import ThreadBatches

        decoder = Decoder(
            self._images,
            self.info,
            self.settings.views,
            seed=self.settings.seed,
            fill=self.settings.fill,
            num_workers=self._num_workers,
            scaling=self._scaling if self._on_cpu else None,
        )
        batch_size, pinned = self.settings.batch_size, not self._on_cpu
        if self.backend == "threads":
            return ThreadBatches(decoder, plan, batch_size, pinned)
        from data_ffcv.streams.ffcv_backend import FfcvBatches

        assert isinstance(self._images, BetonImages)  # a folder is never read through FFCV
        return FfcvBatches(self._images, decoder, plan, batch_size, pinned)

    def finish(self, batch: "LoadedBatch") -> Batch:
        """Returns a batch as tensors that the caller may keep, on the device."""
        *views, target = (torch.from_numpy(array) for array in batch.arrays)
        if not self._on_cpu:
            views = [normalise_tensor(self._to_device(v), self._device_scaling) for v in views]
            target = self._to_device(target)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self._device))
        for number, images in enumerate(views):
            self._erase(images, number, batch)
        return (*views, target.long())

    def sample_numbers(self, batch: "LoadedBatch") -> torch.Tensor:
        """Returns which samples of the file a batch holds, int64 [batch_size], on the device."""
        return torch.tensor(batch.indices, dtype=torch.int64, device=self._device)

    def _erase(self, images: torch.Tensor, number: int, batch: "LoadedBatch") -> None:
        view = self.settings.views[number]
        if view.random_erasing_prob == 0:
            return
        from data_ffcv.pixels.colours import erase

        names = (f"erase {number} {batch.epoch} {index}" for index in batch.indices)
        erase(images, view, [hash_seed(self.settings.seed, name) for name in names])

    def wait(self) -> None:
        """Waits for the last copy, so that the loader may overwrite its buffers."""
        if self._copied is not None:
            self._copied.synchronize()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def open_unchanged(path: Path) -> tuple[ImagesInfo, StoredImages]:
    """Checks and maps one and the same file, even if another is being renamed over it.

    Raises:
        DataError: it is damaged, or changes all the time.
    """
    for _ in range(_NUM_TRIES):
        info = inspect_images(path)
        images = open_images(info)
        if not isinstance(images, BetonImages) or images.is_inspected:
            return info, images
    raise DataError(f"{path} changes all the time; wait until it is complete")


def _usable_workers(num_workers: int) -> int:
    if num_workers < 1:
        raise DataError(f"num_workers must be positive, got {num_workers}")
    num_cores = len(os.sched_getaffinity(0))
    if num_workers > num_cores:
        logger.info("num_workers lowered from %d to the %d usable cores", num_workers, num_cores)
    return min(num_workers, num_cores)


def hash_seed(seed: int, name: str) -> int:
    """Returns 64 bits, so that neighbouring seeds and streams share no epoch's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
