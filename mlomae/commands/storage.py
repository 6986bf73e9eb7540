"""Bytes behind tensors: a storage counts once, from its first tensor until it is freed."""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class StorageCounter:
    """Live bytes of storages by part of the memory.

    Args:
        outside: parts that `total` leaves out.

    Attributes:
        live: bytes by part, now.
        total: bytes of all parts, now.
    """

    def __init__(self, outside: frozenset[str] = frozenset()) -> None:
        self.live: Counter[str] = Counter()
        self.total = 0
        self._outside = outside
        self._known: dict[int, _Storage] = {}

    def add(self, tensor: Tensor, part: str | None) -> None:
        """Count a tensor's storage, unless it is known; None: it is known and takes no bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self._known[key] = _Storage(reference, part, storage.nbytes())
            self._count(part, storage.nbytes())

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a known storage as another part; one that takes no bytes stays so."""
        storage = self._known[tensor.untyped_storage()._cdata]
        if storage.part is not None:
            self._count(storage.part, -storage.num_bytes)
            self._count(part, storage.num_bytes)
            storage.part = part

    def _forget(self, key: int) -> None:
        storage = self._known.pop(key)
        self._count(storage.part, -storage.num_bytes)

    def _count(self, part: str | None, num_bytes: int) -> None:
        if part is not None:
            self.live[part] += num_bytes
            if part not in self._outside:
                self.total += num_bytes


@dataclass
class _Storage:
    reference: weakref.ref[Any]
    part: str | None
    num_bytes: int


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nest of tuples and lists, as operators take and return them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
