"""FFCV parts of our own: the seeded decoder, and an iterator that reports its errors.

Decoding runs in a thread pool of the stream's own. numba's parallel loops would need a threading
layer that survives several loaders at once (workqueue aborts, OpenMP dies after a fork, TBB
may hang at exit) and would compile for every loader.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Full

import numpy as np
import torch

from data_ffcv import _kernels
from data_ffcv._ffcv import (
    AllocationQuery,
    EpochIterator,
    IntDecoder,
    Loader,
    Operation,
    PipelineSpec,
    State,
    keep_torch_threads,
    uncompiled,
)
from data_ffcv.augment import KINDS, Augmentation, to_pair
from data_ffcv.beton import BetonInfo
from data_ffcv.errors import DataError

# (epoch, sample indices): what is to be decoded next.
BatchPlan = tuple[int, np.ndarray]
_COLUMNS = ("mode", "height", "width")


def to_settings(augmentation: Augmentation, seed: int) -> _kernels.Settings:
    """Returns an augmentation as `Settings`."""
    return _kernels.Settings(
        seed=np.uint64(seed),
        kind=KINDS.index(augmentation.kind),
        image_size=(augmentation.height, augmentation.width),
        scale_low=float(augmentation.scale[0]),
        scale_high=float(augmentation.scale[1]),
        ratio_low=float(augmentation.ratio[0]),
        ratio_high=float(augmentation.ratio[1]),
        padding=augmentation.padding,
        flip=augmentation.flip,
        bicubic=augmentation.interpolation == "bicubic",
        resize=to_pair(augmentation.resize or 0),
    )


class SeededDecoder(Operation):
    """Decodes image batches; `epoch` is set by the iterator before each batch."""

    def __init__(self, info: BetonInfo, augmentation: Augmentation, seed: int, num_workers: int):
        super().__init__()
        self.epoch = 0
        self._info = info
        self._num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._settings = to_settings(augmentation, seed)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (*self._settings.image_size, 3), np.dtype("u1")
        state = State(jit_mode=True, device=torch.device("cpu"), shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        return self._decode

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _decode(
        self, indices: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple
    ) -> np.ndarray:
        """Fills out[:len(indices)], each worker one consecutive run of it."""
        bounds = np.linspace(0, len(indices), self._num_workers + 1).astype(int)
        runs = [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        list(
            self._pool.map(
                lambda run: self._decode_run(indices[run], out[run], metadata, storage), runs
            )
        )
        return out[: len(indices)]

    def _decode_run(
        self, indices: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple
    ) -> None:
        file, pointers, sizes = storage
        rows = metadata[indices]
        region = np.searchsorted(pointers, rows["data_ptr"])
        columns = (indices, rows["data_ptr"], sizes[region], *(rows[c] for c in _COLUMNS))
        table = np.stack([column.astype(np.int64) for column in columns], axis=1)
        scratch = np.empty(3 * (table[:, 4] * table[:, 5]).max(), np.uint8)
        corrupt = _kernels.decode_images(
            file.view(np.ndarray), table, self.epoch, self._settings, scratch, out
        )
        if corrupt >= 0:
            raise DataError(
                f"{self._info.path}: the JPEG data of sample {indices[corrupt]} is corrupt; "
                "convert the file again"
            )


class LabelDecoder(IntDecoder):
    """FFCV's integer decoder as one numpy gather, since nothing here is compiled."""

    def generate_code(self) -> Callable:
        def decode(
            indices: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple
        ) -> np.ndarray:
            out[: len(indices), 0] = metadata[indices]
            return out[: len(indices), 0]

        return decode


class BatchIterator(EpochIterator):
    """Loads the planned batches ahead in one thread, over any number of epochs.

    FFCV's own iterator loses exceptions of its thread, leaks the thread when it is left early and
    sets torch's thread count. Buffers are a ring: a batch is valid until the next one is taken.
    """

    def __init__(self, loader: Loader, decoder: SeededDecoder, plan: Iterator[BatchPlan]):
        self._decoder = decoder
        self._plan = plan
        self._failure: BaseException | None = None
        self._ended = False
        super().__init__(loader, [])

    def run(self) -> None:
        num_slots = self.loader.batches_ahead + 2
        try:
            for number, (epoch, indices) in enumerate(self._plan):
                self._decoder.epoch = epoch
                slot = number % num_slots
                if not self._put(self.run_pipeline(number, indices, slot, None)):
                    return
        except BaseException as error:
            self._failure = error
        self._put(None)

    def _put(self, result: tuple | None) -> bool:
        """Hands a result to the consumer; False once the iterator is being closed."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(result, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns views of (images [n, height, width, 3] uint8, labels [n] int64)."""
        result = None if self._ended else self.output_queue.get()
        if result is not None:
            return result
        self._ended = True
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def stop(self) -> None:
        """Ends the loading thread and the workers; returns when they are gone."""
        self.terminate_event.set()
        while self.is_alive():
            try:
                self.output_queue.get_nowait()
            except Empty:
                self.join(timeout=0.01)
        self.close()
        self._decoder.close()


def start_batches(
    info: BetonInfo,
    augmentation: Augmentation,
    plan: Iterator[BatchPlan],
    batch_size: int,
    seed: int,
    num_workers: int,
) -> BatchIterator:
    """Builds FFCV's loader on a checked file and starts loading the planned batches."""
    decoder = SeededDecoder(info, augmentation, seed, num_workers)
    with keep_torch_threads(), uncompiled():
        loader = Loader(
            str(info.path),
            batch_size=batch_size,
            num_workers=1,  # FFCV's own (numba) threads: none of its compiled code runs
            os_cache=True,
            pipelines={
                "image": PipelineSpec("image", decoder=decoder),
                "label": PipelineSpec("label", decoder=LabelDecoder()),
            },
        )
    return BatchIterator(loader, decoder, plan)
