"""The FFCV backend: our decoder and our iterator on FFCV's loader. The one place that imports FFCV.

What its import and its loader do to the process is fixed here:

* Importing it builds a two-entry numba dictionary, which costs 3.5 s of compilation (only Python
  code reads it, so a plain one serves), and sets the number of threads of torch and of numba,
  which starts numba's threading layer. `_quiet_import` keeps it from both.
* Every loader sets these numbers again, compiles a reader and a pipeline, and keeps two
  dictionaries of all samples (600 MB and 4 s for ImageNet). Our decoder is compiled once, brings
  its threads, and reads the file by its tables, so `_bare` leaves all that out.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numba import typed

from data_ffcv.beton.images import BetonImages
from data_ffcv.pixels.decoder import Decoder
from data_ffcv.streams.batches import BATCHES_AHEAD, BatchMemory, BatchPlan, PlannedBatches


def _ignore(*args: object, **kwargs: object) -> None:
    """Stands in for a function that sets the number of threads."""


@contextmanager
def _quiet_import() -> Iterator[None]:
    originals = typed.Dict, numba.set_num_threads, torch.set_num_threads
    typed.Dict = dict
    numba.set_num_threads = torch.set_num_threads = _ignore
    try:
        yield
    finally:
        typed.Dict, numba.set_num_threads, torch.set_num_threads = originals


with _quiet_import():
    from ffcv.loader import Loader
    from ffcv.loader import loader as _loader_module
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline import compiler as _compiler_module
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader

_compiler_module.set_num_threads = numba.set_num_threads  # FFCV's name for it


class _BareReader(Reader):
    """FFCV's reader of one sample's row in place of the tables of all."""

    num_samples: int

    def read_metadata(self) -> None:
        self.num_samples = min(1, self.num_samples)
        super().read_metadata()

    def read_allocation_table(self) -> None:
        self.alloc_table = None


class _BareManager(OSCacheManager):
    """FFCV's manager of mapped files without its tables of samples and its compiled reader.

    ``compile_reader`` must not even be called: it marks numba's one shared type of byte arrays
    as read-only, which breaks whatever is compiled afterwards in this process.
    """

    def __init__(self, reader: object) -> None:
        self.reader = reader
        self.ptrs = self.sizes = np.empty(0, np.uint64)
        self.context = OSCacheContext(self)

    def compile_reader(self) -> None:
        return None


_bare_lock = threading.Lock()


@contextmanager
def _bare() -> Iterator[None]:
    """Lets FFCV take the functions of a pipeline as they are, while a loader is built.

    For the whole process: another thread must not build one of FFCV's loaders meanwhile.
    """
    with _bare_lock:
        _loader_module.Reader, _loader_module.OSCacheManager = _BareReader, _BareManager
        set_num_threads, is_enabled = Compiler.set_num_threads, Compiler.is_enabled
        Compiler.set_num_threads = _ignore
        Compiler.set_enabled(False)
        try:
            yield
        finally:
            Compiler.set_enabled(is_enabled)
            Compiler.set_num_threads = set_num_threads
            _loader_module.Reader, _loader_module.OSCacheManager = Reader, OSCacheManager


class _FusedDecoder(Operation):
    """Decodes whole batches, labels included; `epoch` is set by the iterator before each."""

    def __init__(self, decoder: Decoder, memory: BatchMemory, pinned: bool) -> None:
        super().__init__()
        self.epoch = 0
        self._decoder, self._memory = decoder, memory
        self._pinned = pinned

    def declare_state_and_memory(
        self, previous_state: State
    ) -> tuple[State, tuple[AllocationQuery, ...] | None]:
        first = self._decoder.arrays[0]
        state = State(
            jit_mode=True, device=torch.device("cpu"), shape=first.shape, dtype=first.dtype
        )
        # FFCV's ring of buffers is pinned where there is a GPU. A batch for the CPU is not copied
        # again, so it must be memory that its consumer may keep.
        queries = tuple(AllocationQuery(a.shape, a.dtype) for a in self._decoder.arrays)
        return state, queries if self._pinned else None

    def generate_code(self) -> Callable[..., list[np.ndarray]]:
        def decode(
            indices: np.ndarray,
            buffers: tuple[np.ndarray, ...] | None,
            metadata: np.ndarray,
            storage: tuple[object, ...],
        ) -> list[np.ndarray]:
            batch = list(buffers) if buffers else self._memory.take(len(indices))
            self._decoder.decode(self.epoch, indices, batch)
            return batch

        return decode


class FfcvBatches(PlannedBatches, EpochIterator):
    """FFCV's iterator on a plan of ours.

    FFCV's loop loses exceptions of its thread, leaks the thread when it is left early and sets
    torch's thread count.
    """

    # For `close`, where the constructor has failed.
    closed = True
    terminate_event = threading.Event()

    def __init__(
        self,
        images: BetonImages,
        decoder: Decoder,
        plan: Iterator[BatchPlan],
        batch_size: int,
        pinned: bool,
    ) -> None:
        self._operation = _FusedDecoder(decoder, BatchMemory(decoder, batch_size), pinned)
        pipelines = {name: None for name in ("label", "mask")}
        pipelines["image"] = PipelineSpec("image", decoder=self._operation)
        with _bare():
            loader = Loader(
                f"/proc/self/fd/{images.file.fileno()}",  # also when the path is another file now
                seed=0,  # FFCV would draw one from numpy's global generator
                batch_size=batch_size,
                num_workers=1,  # FFCV's own (numba) threads: none of its compiled code runs
                os_cache=True,
                batches_ahead=BATCHES_AHEAD,
                pipelines=pipelines,
            )
        super().__init__(decoder, plan, loader, [])

    def load(self, number: int, epoch: int, indices: np.ndarray) -> list[np.ndarray]:
        self._operation.epoch = epoch
        slot = number % (self.loader.batches_ahead + 2)
        batch: list[np.ndarray] = self.run_pipeline(number, indices, slot, None)[0]
        return batch

    # An attribute: `__del__` may ask for it when the interpreter has forgotten the module's names.
    close = EpochIterator.close
