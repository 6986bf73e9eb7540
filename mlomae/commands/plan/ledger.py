"""Counts what a cycle would hold, compute and send, while it runs on tensors without memory.

On the `meta` device every operator gives tensors of the right shapes and autograd keeps what it
always keeps, but nothing is allocated and nothing computed.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ACTIVATIONS = "activations"
VECTORS = "vectors in weight space"


@dataclass(frozen=True)
class Moment:
    """What lives at the fullest moment of a phase.

    Attributes:
        parts: bytes by part.
    """

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(eq=False)
class Ledger(TorchDispatchMode):
    """Live bytes of meta tensors by part, their peak in every phase, and what collectives send.

    Attributes:
        live: bytes by part, now.
        peaks: the fullest moment of each phase.
        sent: bytes handed to collectives, by phase and collective; an all-gather or a
            reduce-scatter counts with its whole tensor.
        flops: by phase, a multiplication and an addition as two; of products and convolutions.
        shard_sizes: lengths of the vectors in weight space, to tell them from activations.
        on_host: parts that offload keeps in host memory.
    """

    live: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, Moment] = field(default_factory=dict)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    shard_sizes: set[int] = field(default_factory=set)
    on_host: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Entry] = {}
        self.current_part: str | None = ACTIVATIONS
        self._phase = "build"
        self._total = self._peak = 0

    @contextmanager
    def part(self, name: str | None) -> Iterator[None]:
        """New tensors belong to a part of the memory; None: they take none."""
        self.current_part, before = name, self.current_part
        yield
        self.current_part = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase begins; one that comes again goes on."""
        before, peak = self._phase, self._peak
        self._phase, self._peak = name, self.peaks[name].total if name in self.peaks else 0
        self._look()
        yield
        self._phase, self._peak = before, peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what it made or sent."""
        result = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func._overloadpacket):
            self.flops[self._phase] += count(*args, **(kwargs or {}), out_val=result)
        if func.namespace == "c10d":
            self._note_sent(func.name(), args)
        else:
            self._note(result)
        return result

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_meta:
                self._note_storage(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._note(item)

    def move(self, tensor: Tensor, part: str) -> None:
        """What a tensor holds belongs to another part."""
        entry = self._known[tensor.untyped_storage()._cdata]
        if entry.part is not None:
            self.live[entry.part] -= entry.num_bytes
            self.live[part] += entry.num_bytes
            entry.part = part

    def _note_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        part, num_bytes = self.current_part, storage.nbytes()
        if part == ACTIVATIONS and tensor.dim() == 1 and tensor.numel() in self.shard_sizes:
            part = VECTORS
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = _Entry(reference, part, num_bytes)
        if part is not None:
            self.live[part] += num_bytes
            if part not in self.on_host:
                self._total += num_bytes
                self._look()

    def _look(self) -> None:
        if self._total > self._peak:
            self._peak = self._total
            here = {part: num for part, num in self.live.items() if part not in self.on_host}
            self.peaks[self._phase] = Moment(self._phase, here)

    def _forget(self, key: int) -> None:
        entry = self._known.pop(key)
        if entry.part is not None:
            self.live[entry.part] -= entry.num_bytes
            if entry.part not in self.on_host:
                self._total -= entry.num_bytes

    def _note_sent(self, name: str, args: Any) -> None:
        kind = name.removeprefix("c10d::").rstrip("_")
        self.sent[self._phase, kind] += max(map(_nbytes, args), default=0)


@dataclass
class _Entry:
    """A storage, and what it counts as."""

    storage: weakref.ref[Any]
    part: str | None
    num_bytes: int


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_nbytes, value))
    return 0


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_ATEN = torch.ops.aten
_FLOPS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""FLOPs of operators."""


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention that holds no scores; of itself PyTorch would choose another one on `meta`."""
    result: Tensor = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return result
