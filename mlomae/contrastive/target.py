"""The exponential average of the projector, which makes queries and queue of the third step."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


class TargetProjector:
    """A copy of a projector that follows it: t <- decay * t + (1 - decay) * p.

    The average is float32; what computes is a copy of it in the training's precision. Statistics
    of the batch norms are copied from the projector.

    Args:
        projector: what it starts as; nothing is shared with it.
        dtype: of compute.
    """

    def __init__(
        self, projector: nn.Module, decay: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.decay = decay
        self._average = deepcopy(projector).to(device).requires_grad_(False)
        self._module = deepcopy(self._average).to(dtype)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, projection_dim], with the statistics of the batch of all ranks."""
        projections: Tensor = self._module(features)
        return projections

    @torch.no_grad()
    def update(self, projector: Mapping[str, Tensor]) -> None:
        """Draw the average towards the projector, whose state this is."""
        for name, average in self._average.named_parameters():
            average.lerp_(projector[name].to(average), 1 - self.decay)
        for name, buffer in self._average.named_buffers():
            buffer.copy_(projector[name])
        self._module.load_state_dict(self._average.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        """The average on the CPU, under the projector's names."""
        return {name: t.cpu().clone() for name, t in self._average.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with what `state_dict` gave."""
        self._average.load_state_dict(state)
        self._module.load_state_dict(state)
