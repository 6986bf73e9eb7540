"""The exponential average of a level's weights, as shards (Polyak averaging, "EMA")."""

import torch
from torch import Tensor

from mlomae.training.engines import TrainingLevel, full_weights


class WeightAverage:
    """An average of the fp32 master weights, cut as the level's ZeRO stage cuts them.

    Each rank averages the shard that it owns: there is no communication, and the memory falls as
    1/N where the masters' does. Buffers, such as the statistics of a batch norm, are not averaged.

    Args:
        decay: what the average keeps of itself in each update, in (0, 1).

    Attributes:
        shards: the average, as a vector in weight space; a checkpoint holds it as `Task.vectors`.
    """

    def __init__(self, level: TrainingLevel, decay: float) -> None:
        self.level = level
        self.decay = decay
        self.shards = [shard.detach().flatten().clone() for shard in self._masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Draw the average towards the weights; after each optimizer step."""
        for average, master in zip(self.shards, self._masters(), strict=True):
            average.lerp_(master.flatten().to(average), 1 - self.decay)

    def weights(self, *, everywhere: bool = True) -> dict[str, Tensor]:
        """The averaged weights and the live buffers, whole, fp32, on the CPU. All ranks must call.

        Args:
            everywhere: on all ranks; else the weights are on the first rank alone.
        """
        return full_weights(self.level, self.shards, everywhere=everywhere)

    def _masters(self) -> list[Tensor]:
        return [shard.detach() for shard in self.level.partition.shards()]
