"""From sample numbers to tensors on the device: what streams and evaluation loaders share."""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from data_ffcv.beton.images import BetonImages
from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation
from data_ffcv.pixels.images import Images, open_images
from data_ffcv.pixels.scaling import move_scaling, normalise_tensor, to_scaling
from data_ffcv.sources.folder_info import ImagesInfo, inspect_images

if TYPE_CHECKING:
    from data_ffcv.streams.batches import BatchPlan, Loaded, PlannedBatches

logger = logging.getLogger(__name__)

_NUM_TRIES = 10  # each lost to a file that is renamed over the one just checked

BACKENDS = ("auto", "ffcv", "threads")
Backend = Literal["auto", "ffcv", "threads"]
# Images of each view, float32 [batch_size, 3, height, width], then labels, int64 [batch_size], or
# masks, int64 [batch_size, height, width] with 255 for pixels to be ignored.
Batch = tuple[torch.Tensor, ...]


class Pipeline:
    """Images of a file or folder, what is done to them, and the backend that does it."""

    def __init__(
        self,
        path: str | Path,
        augmentation: Augmentation | Sequence[Augmentation],
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int,
        backend: Backend,
        device: str | torch.device,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be positive, got {batch_size}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise DataError(f"mean and std need three channels, std > 0; got {mean} and {std}")
        self.views = (augmentation,) if isinstance(augmentation, Augmentation) else (*augmentation,)
        if not self.views:
            raise DataError("augmentation must be one, or one for each view; got none")
        self.backend = choose_backend(backend, Path(path))
        self.info, self._images = _open_unchanged(Path(path))
        self.batch_size = batch_size
        for view in self.views:
            view.check_fits(self.info)
        self._num_workers = _usable_workers(num_workers)
        self._seed = seed
        self._device = torch.device(device)
        self._mean, self._scaling = mean, to_scaling(mean, std)
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
            self.views,
            seed=self._seed,
            fill=tuple(min(max(round(255 * mean), 0), 255) for mean in self._mean),
            num_workers=self._num_workers,
            scaling=self._scaling if self._on_cpu else None,
        )
        if self.backend == "threads":
            return ThreadBatches(decoder, plan, self.batch_size, pinned=not self._on_cpu)
        from data_ffcv.streams.ffcv_backend import FfcvBatches

        return FfcvBatches(self._images, decoder, plan, self.batch_size, pinned=not self._on_cpu)

    def finish(self, batch: "Loaded") -> Batch:
        """Returns a batch as tensors of the caller's own, on the device."""
        *views, target = (torch.from_numpy(array) for array in batch.arrays)
        if not self._on_cpu:
            views = [normalise_tensor(self._to_device(v), self._device_scaling) for v in views]
            target = self._to_device(target)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))
        for number, images in enumerate(views):
            self._erase(images, number, batch)
        return (*views, target.long())

    def sample_numbers(self, batch: "Loaded") -> torch.Tensor:
        """Returns which samples of the file a batch holds, int64 [batch_size], on the device."""
        return torch.tensor(batch.indices, dtype=torch.int64, device=self._device)

    def _erase(self, images: torch.Tensor, number: int, batch: "Loaded") -> None:
        view = self.views[number]
        if view.random_erasing_prob == 0:
            return
        from data_ffcv.pixels.colours import erase

        names = (f"erase {number} {batch.epoch} {index}" for index in batch.indices)
        erase(images, view, [hash_seed(self._seed, name) for name in names])

    def wait(self) -> None:
        """Waits for the last copy, so that the loader may overwrite its buffers."""
        if self._copied is not None:
            self._copied.synchronize()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def _open_unchanged(path: Path) -> tuple[ImagesInfo, Images]:
    """Checks and maps one and the same file, even if another is being renamed over it."""
    for _ in range(_NUM_TRIES):
        info = inspect_images(path)
        images = open_images(info)
        if not isinstance(images, BetonImages) or images.is_inspected:
            return info, images
    raise DataError(f"{path} changes all the time; wait until it is complete")


def choose_backend(backend: Backend, path: Path) -> Literal["ffcv", "threads"]:
    """Returns the backend that reads `path`; says once when FFCV would, but is not installed.

    Raises:
        DataError: the wanted backend does not exist, is not installed or cannot read `path`.
    """
    if backend not in BACKENDS:
        raise DataError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "threads" or (backend == "auto" and path.is_dir()):
        return "threads"
    if path.is_dir():
        raise DataError(
            f"{path} is a folder, which backend ffcv cannot read; convert it with "
            "python -m data_ffcv.convert imagefolder, or use backend auto or threads"
        )
    reason = _why_no_ffcv()
    if reason is None:
        return "ffcv"
    if backend == "ffcv":
        raise DataError(
            f"FFCV cannot be used ({reason}); install it (pip install ffcv), or use backend auto "
            "or threads"
        )
    _tell_no_ffcv(reason)
    return "threads"


@cache
def _why_no_ffcv() -> str | None:
    """Returns why FFCV cannot be imported, None where it can."""
    if importlib.util.find_spec("ffcv") is None:
        return "it is not installed"
    try:
        import data_ffcv.streams.ffcv_backend  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # such as a library it was built with
        return " ".join(str(error).split())
    return None


@cache
def _tell_no_ffcv(reason: str) -> None:
    logger.warning(
        "FFCV cannot be used (%s): .beton files are read by threads, batches are the same", reason
    )


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
