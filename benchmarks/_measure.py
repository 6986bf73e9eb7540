"""Time and peak memory of one call.

On a CPU, memory is the resident size of the whole process as the kernel counts it. On CUDA it is
what PyTorch's allocator has given out.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEMORY_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}
"""Environment of a CPU process whose memory is measured.

glibc then gives freed tensors back to the kernel at once, so that the resident size is that of the
living tensors. By default it keeps a part of them, depending on the order of allocations. Page
faults make this slower, so time is measured in a process without it.
"""


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds."""
    gc.collect()
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def peak_of(function: Callable[[], Any], device: torch.device) -> float:
    """Megabytes (1e6 bytes) of the process at most during a call."""
    before = resident(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    function()
    return max(before, _status("VmHWM"))


def resident(device: torch.device) -> float:
    """Megabytes of the process now."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
