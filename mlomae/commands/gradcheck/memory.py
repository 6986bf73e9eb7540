"""How many bytes tensors take at once: what a derivative costs in memory, and a training step."""

from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlomae.commands.storage import StorageCounter, tensors_in


class PeakMemory:
    """Most bytes that live at once inside, or since `restart`, above those that lived before.

    On the CPU every tensor is counted, but not what an operator allocates and frees inside itself.
    On CUDA it is the allocator's count, which includes that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counter = _LiveBytes()
        self._before = 0

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._counter.__enter__()  # type: ignore[no-untyped-call]
        self.restart()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            self._counter.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._counter.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        """Forget the peak so far, but not what has come to live."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._counter.peak = self._counter.live

    @property
    def bytes(self) -> int:
        """The peak, after the end."""
        return self._counter.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._storages = StorageCounter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tensors_in((*args, *(kwargs or {}).values())):
            self._storages.add(tensor, None)  # what comes in and is unknown lived before
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._storages.add(tensor, "created")
        self.peak = max(self.peak, self.live)
        return result

    @property
    def live(self) -> int:
        """Bytes, now."""
        return self._storages.total
