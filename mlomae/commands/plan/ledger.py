"""Counts what a cycle would hold, compute and send, while it runs on tensors without memory.

On the `meta` device every operator gives tensors of the right shapes and autograd keeps what it
always keeps, but nothing is allocated and nothing computed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mlomae.commands.storage import StorageCounter, tensors_in

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


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of meta tensors by part, their peak in every phase, and what collectives send.

    Args:
        on_host: parts that offload keeps in host memory.

    Attributes:
        live: bytes by part, now.
        peaks: the fullest moment of each phase.
        sent: bytes handed to collectives, by phase and collective; an all-gather or a
            reduce-scatter counts with its whole tensor.
        flops: by phase, a multiplication and an addition as two; of products and convolutions.
        shard_sizes: lengths of the vectors in weight space, to tell them from activations.
    """

    def __init__(self, on_host: frozenset[str] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_host = on_host
        self.peaks: dict[str, Moment] = {}
        self.sent: Counter[tuple[str, str]] = Counter()
        self.flops: Counter[str] = Counter()
        self.shard_sizes: set[int] = set()
        self.current_part: str | None = ACTIVATIONS
        self._storages = StorageCounter(outside=on_host)
        self.live = self._storages.live
        self._phase = "build"
        self._peak = 0

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
        self._update_peak()
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
            self._note_made(result)
        return result

    def move(self, tensor: Tensor, part: str) -> None:
        """What a tensor holds belongs to another part."""
        self._storages.move(tensor, part)

    def _note_made(self, result: Any) -> None:
        for tensor in tensors_in(result):
            if tensor.is_meta:
                self._storages.add(tensor, self._part_of(tensor))
        self._update_peak()

    def _part_of(self, tensor: Tensor) -> str | None:
        """The current part; what has the length of a shard is no activation."""
        is_vector = tensor.dim() == 1 and tensor.numel() in self.shard_sizes
        return VECTORS if is_vector and self.current_part == ACTIVATIONS else self.current_part

    def _update_peak(self) -> None:
        if self._storages.total > self._peak:
            self._peak = self._storages.total
            here = {part: num for part, num in self.live.items() if part not in self.on_host}
            self.peaks[self._phase] = Moment(self._phase, here)

    def _note_sent(self, name: str, args: Any) -> None:
        kind = name.removeprefix("c10d::").rstrip("_")
        self.sent[self._phase, kind] += max(map(_nbytes, args), default=0)


def _nbytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any) -> int:
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any, **__: Any
) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


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
