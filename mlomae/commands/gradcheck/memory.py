"""How many bytes tensors take at once: what a derivative costs in memory, and a training step."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
            self._counter.__enter__()
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
            self._counter.__exit__(kind, error, traceback)

    def restart(self) -> None:
        """Forget the peak so far, but not what has come to live."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._counter.peak = self._counter.live

    @property
    def bytes(self) -> int:
        """The peak, after the end."""
        return self._counter.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            self._note(value, is_new=False)  # what comes in and is unknown lived before
        result = func(*args, **(kwargs or {}))
        self._note(result, is_new=True)
        return result

    def _note(self, value: Any, is_new: bool) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                self._note(item, is_new)
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes() if is_new else 0
            if key in self._known:
                return
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, num_bytes))
            self.live += num_bytes
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self.live -= num_bytes
