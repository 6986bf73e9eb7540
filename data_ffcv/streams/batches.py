"""Loading ahead in a thread: what both backends share, and the backend without FFCV."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread, current_thread
from typing import Any, NamedTuple

import numpy as np
import torch

from data_ffcv.pixels.decoder import Decoder

# (epoch, sample indices): what is to be decoded next.
BatchPlan = tuple[int, np.ndarray]


class LoadedBatch(NamedTuple):
    """A batch as a thread has loaded it: its plan, and the arrays of `Decoder`."""

    epoch: int
    indices: np.ndarray
    arrays: list[np.ndarray]


BATCHES_AHEAD = 2  # a third would cost memory and, measured, gains nothing


class PlannedBatches(Thread):
    """Iterator over planned batches, loaded ahead by a thread, over any number of epochs.

    A subclass sets `output_queue` and `terminate_event`, starts the thread, and loads a batch.
    An exception of the thread is raised in the consumer.
    """

    output_queue: Queue["LoadedBatch | None"]
    terminate_event: Event

    def __init__(self, decoder: Decoder, plan: Iterator[BatchPlan], *args: Any) -> None:
        self._decoder = decoder
        self._plan = plan
        self._failure: BaseException | None = None
        self._ended = False
        super().__init__(*args)

    def load(self, number: int, epoch: int, indices: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays of batch `number`, counted from this iterator's first."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            for number, (epoch, indices) in enumerate(self._plan):
                if not self._put(LoadedBatch(epoch, indices, self.load(number, epoch, indices))):
                    return
        except BaseException as error:
            self._failure = error
        finally:
            self._decoder.close(wait=False)
        self._put(None)

    def _put(self, batch: LoadedBatch | None) -> bool:
        """Hands a batch to the consumer; False once the iterator is being closed."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(batch, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        """Returns the next batch.

        Its arrays may be part of a ring of buffers: valid until the next batch is taken.
        """
        batch = None if self._ended else self.output_queue.get()
        if batch is not None:
            return batch
        self._ended = True
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def stop(self) -> None:
        """Ends the loading thread and the workers; returns when they are gone.

        Garbage collection may run this in one of these threads, which cannot wait for itself:
        then it only asks them to end.
        """
        self.terminate_event.set()
        if current_thread() is self or self._decoder.runs_here():
            return
        while self.is_alive():
            try:
                self.output_queue.get_nowait()
            except Empty:
                self.join(timeout=0.01)
        self.close()
        self._decoder.close(wait=True)
        with suppress(Full):
            self.output_queue.put_nowait(None)  # for a consumer that waits in another thread

    def close(self) -> None:
        """Releases what the subclass holds."""


class ThreadBatches(PlannedBatches):
    """The backend without FFCV: a ring of pinned buffers for CUDA, memory to keep for the CPU."""

    def __init__(
        self, decoder: Decoder, plan: Iterator[BatchPlan], batch_size: int, pinned: bool
    ) -> None:
        self.output_queue = Queue(BATCHES_AHEAD)
        self.terminate_event = Event()
        self._ring = [
            [_pinned((batch_size, *array.shape), array.dtype) for array in decoder.arrays]
            for _ in range(BATCHES_AHEAD + 2 if pinned else 0)
        ]
        self._memory = BatchMemory(decoder, batch_size)
        super().__init__(decoder, plan)
        self.daemon = True
        self.start()

    def load(self, number: int, epoch: int, indices: np.ndarray) -> list[np.ndarray]:
        if self._ring:
            batch = [array[: len(indices)] for array in self._ring[number % len(self._ring)]]
        else:
            batch = self._memory.take(len(indices))
        self._decoder.decode(epoch, indices, batch)
        return batch


class BatchMemory:
    """Arrays for batches that their consumer may keep; those that nobody holds are used again.

    The system clears every page of fresh memory, which takes about as long as to decode into it.
    """

    _NUM_KEPT = BATCHES_AHEAD + 3  # being loaded, taken last, about to be dropped

    def __init__(self, decoder: Decoder, batch_size: int) -> None:
        self._shapes = [((batch_size, *array.shape), array.dtype) for array in decoder.arrays]
        self._kept: list[list[np.ndarray]] = []

    def take(self, count: int) -> list[np.ndarray]:
        """Returns uninitialised arrays whose first axis is `count`, at most the batch size."""
        arrays = next(filter(_nobody_holds, self._kept), None)
        if arrays is None:
            arrays = [np.empty(shape, dtype) for shape, dtype in self._shapes]
            self._kept = [*self._kept, arrays][-self._NUM_KEPT :]
        return [array[:count] for array in arrays]


def _nobody_holds(arrays: list[np.ndarray]) -> bool:
    """Whether the list alone refers to its arrays: no view, and no tensor on their memory."""
    return all(sys.getrefcount(arrays[n]) <= _NUM_REFERENCES for n in range(len(arrays)))


_PROBE = [np.empty(0)]
_NUM_REFERENCES = sys.getrefcount(_PROBE[0])


def _pinned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=True).numpy()
