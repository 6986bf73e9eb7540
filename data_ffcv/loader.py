"""Endless training streams and finite evaluation loaders over ``.beton`` files.

A stream's batches are a pure function of (file, indices, seed, name, batch number): neither the
number of workers, nor the number of ranks, nor a resume changes a pixel or the order.
"""

import hashlib
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_ffcv.augment import Augmentation
from data_ffcv.beton import BetonInfo, inspect_beton
from data_ffcv.errors import DataError
from data_ffcv.splits import check_rank, shard_indices

if TYPE_CHECKING:
    from data_ffcv._decoder import BatchIterator, BatchPlan

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]


class Stream:
    """Endless iterator of (images, labels); made by `open_stream`.

    Also a context manager. Images are float32 [batch_size, 3, height, width] and labels
    int64 [batch_size], both owned by the caller and on the stream's device.

    Attributes:
        num_batches_per_epoch: Full global batches in one pass over the samples.
        batches_drawn: Number of the next batch, counted from the stream's very beginning;
            as ``start_batch`` of a new stream it continues exactly here.
    """

    def __init__(
        self,
        batches: "BatchIterator",
        to_tensors: "_ToTensors",
        num_batches_per_epoch: int,
        start_batch: int,
    ) -> None:
        self.num_batches_per_epoch = num_batches_per_epoch
        self.batches_drawn = start_batch
        self._batches = batches
        self._to_tensors = to_tensors
        # Runs once: on close(), when the stream is collected, or at the interpreter's exit.
        self._finalizer = weakref.finalize(self, batches.stop)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, or raises what the loading thread met."""
        if not self._finalizer.alive:
            raise DataError("this stream is closed; open a new one")
        self._to_tensors.wait()
        batch = self._to_tensors(*next(self._batches))
        self.batches_drawn += 1
        return batch

    def close(self) -> None:
        """Stops and joins the loading threads; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class EvalLoader:
    """Finite, re-iterable loader over a rank's samples in order; made by `open_eval_loader`.

    Each iteration starts its own threads and joins them, also when it is left early.
    """

    def __init__(
        self,
        info: BetonInfo,
        augmentation: Augmentation,
        indices: np.ndarray,
        batch_size: int,
        num_workers: int,
        to_tensors: "_ToTensors",
    ) -> None:
        self.info = info
        self.indices = indices
        self._augmentation = augmentation
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._to_tensors = to_tensors

    def __len__(self) -> int:
        return -(-len(self.indices) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        from data_ffcv._decoder import start_batches

        starts = range(0, len(self.indices), self._batch_size)
        plan = ((0, self.indices[start : start + self._batch_size]) for start in starts)
        batches = start_batches(
            self.info, self._augmentation, plan, self._batch_size, 0, self._num_workers
        )
        try:
            for images, labels in batches:
                yield self._to_tensors(images, labels)
                self._to_tensors.wait()
        finally:
            batches.stop()


def open_stream(
    path: str | Path,
    *,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    indices: np.ndarray | None = None,
    name: str = "train",
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    num_workers: int = 1,
    device: str | torch.device = "cpu",
) -> Stream:
    """Opens an endless stream of augmented training batches.

    Every epoch is a fresh permutation of the samples, cut into global batches of
    ``batch_size * world_size``; what is left over is dropped. Rank r takes the r-th part of each.

    Args:
        path: The ``.beton`` file.
        augmentation: What is done to each image.
        batch_size: Images per batch and rank.
        seed: The run's seed; streams of one run differ by `name`.
        mean: Channel means that are subtracted, for pixels in [0, 1].
        std: Channel deviations that are divided by.
        indices: Samples to draw from; None for all.
        name: The stream's name; its hash with `seed` decides order, crops and flips.
        rank: This process.
        world_size: Number of processes; all must pass the same other arguments.
        start_batch: Batches to skip. Skipping is free: nothing is decoded.
        num_workers: Decoding threads, at most the cores this process may use.
        device: Where the tensors go; to CUDA by an asynchronous copy from pinned memory.

    Raises:
        DataError: the file is damaged, a setting is wrong or there are too few samples.
    """
    info = inspect_beton(path)
    augmentation.check_fits(info)
    check_rank(rank, world_size)
    _check_batch_size(batch_size)
    if start_batch < 0:
        raise DataError(f"start_batch must not be negative, got {start_batch}")
    samples = _check_indices(info, indices)
    num_batches = len(samples) // (batch_size * world_size)
    if num_batches == 0:
        raise DataError(
            f"{info.path}: {len(samples)} samples do not fill one global batch of "
            f"{batch_size * world_size}; lower batch_size"
        )
    to_tensors = _ToTensors(mean, std, device)
    stream_seed = _hash_seed(seed, name)
    plan = _plan_epochs(samples, stream_seed, batch_size, rank, world_size, start_batch)

    from data_ffcv._decoder import start_batches

    batches = start_batches(
        info, augmentation, plan, batch_size, stream_seed, _usable_workers(num_workers)
    )
    return Stream(batches, to_tensors, num_batches, start_batch)


def open_eval_loader(
    path: str | Path,
    *,
    augmentation: Augmentation,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    indices: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
    device: str | torch.device = "cpu",
) -> EvalLoader:
    """Opens a loader of this rank's samples in order, each exactly once over all ranks.

    Arguments as in `open_stream`. The last batch may be smaller.

    Raises:
        DataError: the file is damaged or a setting is wrong.
    """
    info = inspect_beton(path)
    augmentation.check_fits(info)
    _check_batch_size(batch_size)
    samples = shard_indices(_check_indices(info, indices), rank, world_size)
    to_tensors = _ToTensors(mean, std, device)
    workers = _usable_workers(num_workers)
    return EvalLoader(info, augmentation, samples, batch_size, workers, to_tensors)


class _ToTensors:
    """Copies a batch out of the loader's ring buffers and normalises it on the device."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: str | torch.device
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise DataError(f"mean and std need three channels, std > 0; got {mean} and {std}")
        self._device = torch.device(device)
        self._mean = self._per_channel(mean)
        self._std = self._per_channel(std)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> Batch:
        pixels = self._to_device(images).permute(0, 3, 1, 2)
        target = self._to_device(labels).clone()
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        normalised = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return normalised.sub_(self._mean).div_(self._std), target

    def wait(self) -> None:
        """Waits for the last copy, so that the loader may overwrite its buffers."""
        if self._copied is not None:
            self._copied.synchronize()

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=self._device.type == "cuda")

    def _per_channel(self, values: Sequence[float]) -> torch.Tensor:
        return 255 * torch.tensor(values, dtype=torch.float32, device=self._device).view(3, 1, 1)


def _plan_epochs(
    samples: np.ndarray, seed: int, batch_size: int, rank: int, world_size: int, start_batch: int
) -> Iterator["BatchPlan"]:
    """Yields (epoch, this rank's samples) for batch start_batch, start_batch + 1, ..."""
    global_size = batch_size * world_size
    first_epoch, first_batch = divmod(start_batch, len(samples) // global_size)
    epoch = first_epoch
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        for batch in range(first_batch, len(samples) // global_size):
            start = batch * global_size + rank * batch_size
            yield epoch, order[start : start + batch_size]
        epoch, first_batch = epoch + 1, 0


def _check_indices(info: BetonInfo, indices: np.ndarray | None) -> np.ndarray:
    if indices is None:
        return np.arange(info.num_samples)
    samples = np.asarray(indices, dtype=np.int64)
    if samples.ndim != 1 or (
        samples.size and not 0 <= samples.min() <= samples.max() < info.num_samples
    ):
        raise DataError(f"indices of {info.path} must be a list within [0, {info.num_samples})")
    return samples


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size must be positive, got {batch_size}")


def _usable_workers(num_workers: int) -> int:
    if num_workers < 1:
        raise DataError(f"num_workers must be positive, got {num_workers}")
    num_cores = len(os.sched_getaffinity(0))
    if num_workers > num_cores:
        logger.info("num_workers lowered from %d to the %d usable cores", num_workers, num_cores)
    return min(num_workers, num_cores)


def _hash_seed(seed: int, name: str) -> int:
    """Returns 64 bits, so that neighbouring seeds and streams share no epoch's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
