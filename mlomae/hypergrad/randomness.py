"""Random states that are set back, so that a derivative evaluation draws what the step drew."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """States of the host's generator and, on CUDA, of the device's."""

    host: Tensor
    device: Tensor | None
    index: torch.device

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The present states."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), on_device, device)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, self.index)


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """The generators are afterwards where they were before."""
    state = RandomState.now(device)
    try:
        yield
    finally:
        state.restore()
