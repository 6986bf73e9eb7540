"""The one place that imports FFCV, and mends what its import does to the process.

* ``ffcv.fields.rgb_image`` builds a two-entry numba dictionary at import, which costs 3.5 s of
  compilation. Only Python code reads it, so a plain dictionary serves.
* FFCV calls ``torch.set_num_threads`` at import and when a loader is built, for the whole
  process; `keep_torch_threads` undoes that.
* Our decoder is compiled once, by itself (`data_ffcv._kernels`); `uncompiled` stops FFCV from
  compiling a reader and a pipeline for every loader.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numba import typed


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restores torch's thread count when the block ends."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _plain_dictionaries() -> Iterator[None]:
    original, typed.Dict = typed.Dict, dict
    try:
        yield
    finally:
        typed.Dict = original


with keep_torch_threads(), _plain_dictionaries():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.libffcv import ctypes_imdecode
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.writer import DatasetWriter


_uncompiled_lock = threading.Lock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Lets FFCV take the functions of a pipeline as they are, while a loader is built.

    ``OSCacheManager.compile_reader`` must not even be called: it marks numba's one shared type
    of byte arrays as read-only, which breaks whatever is compiled afterwards in this process.
    """
    with _uncompiled_lock:
        compile_reader = OSCacheManager.compile_reader
        OSCacheManager.compile_reader = lambda manager: None
        Compiler.set_enabled(False)
        try:
            yield
        finally:
            Compiler.set_enabled(True)
            OSCacheManager.compile_reader = compile_reader


__all__ = [
    "AllocationQuery",
    "DatasetWriter",
    "EpochIterator",
    "IntDecoder",
    "IntField",
    "Loader",
    "MemoryAllocator",
    "Operation",
    "PipelineSpec",
    "RGBImageField",
    "State",
    "ctypes_imdecode",
    "keep_torch_threads",
    "uncompiled",
]
