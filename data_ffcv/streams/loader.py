"""Endless training streams and finite evaluation loaders over ``.beton`` files and image folders.

A stream's batches are a pure function of (file, indices, seed, name, batch number): neither the
backend, nor the number of workers, nor the number of ranks, nor a resume changes a pixel or the
order. The device changes the noise of random erasing alone.
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation
from data_ffcv.sources.folder_info import ImagesInfo
from data_ffcv.splits import check_rank, shard_indices
from data_ffcv.streams.pipeline import Batch, Pipeline, hash_seed
from data_ffcv.streams.settings import Backend, LoaderSettings, to_views

if TYPE_CHECKING:
    from data_ffcv.streams.batches import BatchPlan, PlannedBatches


class Stream:
    """Endless iterator of batches; made by `open_stream`.

    Also a context manager. A batch is (images, labels), with one tensor of images for each view,
    or (images, masks); sample numbers, int64 [batch_size], follow where they were asked for. Images
    are float32 [batch_size, 3, height, width], labels int64 [batch_size], masks int64 [batch_size,
    height, width]. All are on the stream's device and owned by the caller, who may keep them.

    Attributes:
        backend: ``ffcv`` or ``threads``.
        batches_drawn: Number of the next batch, counted from the stream's very beginning;
            as ``start_batch`` of a new stream it continues exactly here.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        plan: Iterator["BatchPlan"],
        start_batch: int,
        with_numbers: bool = False,
    ) -> None:
        self.backend = pipeline.backend
        self.batches_drawn = start_batch
        self._pipeline = pipeline
        self._with_numbers = with_numbers
        self._batches = pipeline.start(plan)
        # Runs once: on close(), when the stream is collected, or at the interpreter's exit.
        self._finalizer = weakref.finalize(self, _stop, pipeline, self._batches)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, or raises what the loading thread met."""
        if not self._finalizer.alive:
            raise DataError("this stream is closed; open a new one")
        self._pipeline.wait()
        batch = next(self._batches)
        self.batches_drawn += 1
        tensors = self._pipeline.finish(batch)
        return (*tensors, self._pipeline.sample_numbers(batch)) if self._with_numbers else tensors

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

    def __init__(self, pipeline: Pipeline, indices: np.ndarray) -> None:
        self.info = pipeline.info
        self.indices = indices
        self._pipeline = pipeline

    def __len__(self) -> int:
        return -(-len(self.indices) // self._pipeline.settings.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size = self._pipeline.settings.batch_size
        starts = range(0, len(self.indices), size)
        batches = self._pipeline.start((0, self.indices[start : start + size]) for start in starts)
        try:
            for batch in batches:
                yield self._pipeline.finish(batch)
                self._pipeline.wait()
        finally:
            _stop(self._pipeline, batches)


def _stop(pipeline: Pipeline, batches: "PlannedBatches") -> None:
    try:
        pipeline.wait()  # copies read the buffers that end with the batches
    finally:
        batches.stop()


def open_stream(
    path: str | Path,
    *,
    augmentation: Augmentation | Sequence[Augmentation],
    batch_size: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    indices: np.ndarray | None = None,
    name: str = "train",
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    with_numbers: bool = False,
    num_workers: int = 1,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> Stream:
    """Opens an endless stream of augmented training batches.

    Every epoch is a fresh permutation of the samples, cut into global batches of
    ``batch_size * world_size``; what is left over is dropped. Rank r takes the r-th part of each.

    Args:
        path: A ``.beton`` file, or a folder of class folders.
        augmentation: What is done to each image; several make as many views of each, in which
            crops, flips and colours are drawn independently.
        batch_size: Images per batch and rank.
        seed: The run's seed; streams of one run differ by `name`.
        mean: Channel means that are subtracted, for pixels in [0, 1].
        std: Channel deviations that are divided by.
        indices: Samples to draw from; None for all.
        name: The stream's name; its hash with `seed` decides order, crops, flips and colours.
        rank: This process.
        world_size: Number of processes; all must pass the same other arguments.
        start_batch: Batches to skip. Skipping is free: nothing is decoded.
        with_numbers: Each batch ends with the numbers of its samples in the file.
        num_workers: Decoding threads, at most the cores this process may use.
        backend: ``ffcv`` reads a ``.beton`` through FFCV's loader; ``threads`` reads it, or a
            folder, with Python threads, and gives the same batches. ``auto`` takes FFCV
            where it is installed and `path` is a file.
        device: Where the tensors go; to CUDA by an asynchronous copy from pinned memory.

    Raises:
        DataError: the file is damaged, a setting is wrong or there are too few samples.
    """
    stream_seed = hash_seed(seed, name)
    settings = LoaderSettings(
        views=to_views(augmentation),
        batch_size=batch_size,
        seed=stream_seed,
        mean=mean,
        std=std,
        num_workers=num_workers,
        backend=backend,
        device=device,
    )
    pipeline = Pipeline(path, settings)
    check_rank(rank, world_size)
    if start_batch < 0:
        raise DataError(f"start_batch must not be negative, got {start_batch}")
    samples = check_indices(pipeline.info, indices)
    if len(samples) < batch_size * world_size:
        raise DataError(
            f"{path}: {len(samples)} samples do not fill one global batch of "
            f"{batch_size * world_size}; lower batch_size"
        )
    plan = _plan_epochs(samples, stream_seed, batch_size, rank, world_size, start_batch)
    return Stream(pipeline, plan, start_batch, with_numbers)


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
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> EvalLoader:
    """Opens a loader of this rank's samples in order, each exactly once over all ranks.

    Arguments as in `open_stream`. The last batch may be smaller.

    Raises:
        DataError: the file is damaged or a setting is wrong.
    """
    settings = LoaderSettings(
        views=to_views(augmentation),
        batch_size=batch_size,
        seed=0,
        mean=mean,
        std=std,
        num_workers=num_workers,
        backend=backend,
        device=device,
    )
    pipeline = Pipeline(path, settings)
    samples = shard_indices(check_indices(pipeline.info, indices), rank, world_size)
    return EvalLoader(pipeline, samples)


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


def check_indices(info: ImagesInfo, indices: np.ndarray | None) -> np.ndarray:
    """Returns which samples are wanted, int64 [n]; None stands for all.

    Raises:
        DataError: they are no list of numbers of samples.
    """
    if indices is None:
        return np.arange(info.num_samples)
    try:
        samples = np.asarray(indices)
    except ValueError:  # lists of several lengths
        samples = np.empty((0, 0))
    is_list = samples.ndim == 1 and (samples.dtype.kind in "iu" or not samples.size)
    samples = samples.astype(np.int64) if is_list else samples
    if not is_list or (samples.size and not 0 <= samples.min() <= samples.max() < info.num_samples):
        raise DataError(
            f"indices of {info.path} must be a list of integers within [0, {info.num_samples})"
        )
    return samples
