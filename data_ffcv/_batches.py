"""Loading ahead in a thread: what both backends share, and the backend without FFCV."""

from collections.abc import Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch

from data_ffcv._decoder import Decoder

# (epoch, sample indices): what is to be decoded next.
BatchPlan = tuple[int, np.ndarray]
BATCHES_AHEAD = 2  # a third would cost memory and, measured, gains nothing


class PlannedBatches:
    """Iterator over planned batches, loaded ahead by a thread, over any number of epochs.

    A subclass is a thread as well, has `output_queue` and `terminate_event`, and loads a batch.
    An exception of the thread is raised in the consumer.
    """

    output_queue: Queue
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
                if not self._put(self.load(number, epoch, indices)):
                    return
        except BaseException as error:
            self._failure = error
        self._put(None)

    def _put(self, batch: list[np.ndarray] | None) -> bool:
        """Hands a batch to the consumer; False once the iterator is being closed."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(batch, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return self

    def __next__(self) -> list[np.ndarray]:
        """Returns the arrays of the next batch (see `Decoder`).

        They may be part of a ring of buffers: valid until the next batch is taken.
        """
        batch = None if self._ended else self.output_queue.get()
        if batch is not None:
            return batch
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

    def close(self) -> None:
        """Releases what the subclass holds."""


class ThreadBatches(PlannedBatches, Thread):
    """The backend without FFCV: a ring of pinned buffers for CUDA, fresh memory for the CPU."""

    def __init__(
        self, decoder: Decoder, plan: Iterator[BatchPlan], batch_size: int, pinned: bool
    ) -> None:
        self.output_queue = Queue(BATCHES_AHEAD)
        self.terminate_event = Event()
        self._ring = [
            [_empty((batch_size, *array.shape), array.dtype, True) for array in decoder.arrays]
            for _ in range(BATCHES_AHEAD + 2 if pinned else 0)
        ]
        super().__init__(decoder, plan)
        self.daemon = True
        self.start()

    def load(self, number: int, epoch: int, indices: np.ndarray) -> list[np.ndarray]:
        if self._ring:
            batch = [array[: len(indices)] for array in self._ring[number % len(self._ring)]]
        else:
            batch = fresh_batch(self._decoder, len(indices))
        self._decoder.decode(epoch, indices, batch)
        return batch


def fresh_batch(decoder: Decoder, count: int) -> list[np.ndarray]:
    """Returns uninitialised arrays for a batch, which its consumer may keep."""
    return [_empty((count, *array.shape), array.dtype, False) for array in decoder.arrays]


def _empty(shape: tuple[int, ...], dtype: np.dtype, pinned: bool) -> np.ndarray:
    # torch's memory, unlike numpy's, is aligned for its vector instructions
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=kind, pin_memory=pinned).numpy()
