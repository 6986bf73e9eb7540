"""Time of a cycle: FLOPs at a utilisation, and what collectives move."""

from dataclasses import dataclass

import torch

from mlomae.commands.plan.cycle import Cycle
from mlomae.commands.plan.hardware import Gpu
from mlomae.pretraining.recipe import PretrainingRecipe

_TIMES_MOVED = {"allreduce": 2}  # by a ring; all other collectives move a tensor once


@dataclass(frozen=True)
class Cluster:
    """Where it shall run.

    Attributes:
        utilization: share of the peak FLOP/s that is reached while nothing else is waited for.
        bandwidth: bytes/s between two nodes, one direction, all network cards of a node together.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    utilization: float
    bandwidth: float

    @property
    def world_size(self) -> int:
        """Ranks: one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def link(self) -> float:
        """The slowest bytes/s on a ring through all GPUs."""
        return min(self.gpu.link, self.bandwidth) if self.nodes > 1 else self.gpu.link


@dataclass(frozen=True)
class Speed:
    """Expected times and rates.

    Attributes:
        compute, communication: seconds of a cycle.
        moved: bytes that a GPU sends in a cycle, by phase.
        images_per_cycle: of the first level, over all ranks; views of an image count once.
        drawn_per_cycle: crops that all streams draw.
    """

    cluster: Cluster
    compute: float
    communication: float
    moved: dict[str, float]
    images_per_cycle: int
    drawn_per_cycle: int

    @property
    def seconds(self) -> float:
        """Of a cycle in which nothing overlaps."""
        return self.compute + self.communication

    @property
    def images_per_second(self) -> float:
        """Over all ranks, when nothing overlaps."""
        return self.images_per_cycle / self.seconds

    @property
    def images_per_second_at_best(self) -> float:
        """The same when the shorter of the two hides behind the longer."""
        return self.images_per_cycle / max(self.compute, self.communication)

    @property
    def communication_share(self) -> float:
        """Of the time when nothing overlaps."""
        return self.communication / self.seconds

    @property
    def loader_rate(self) -> float:
        """Crops per second that the streams of a node must give, at best speed."""
        fastest = max(self.compute, self.communication)
        return self.drawn_per_cycle / fastest / self.cluster.nodes


def expected_speed(
    recipe: PretrainingRecipe, cycle: Cycle, cluster: Cluster, dtype: torch.dtype
) -> Speed:
    """Times of a recipe's cycle on a cluster."""
    peak = cluster.gpu.flops(dtype) * cluster.utilization
    moved = moved_bytes(cycle, cluster.world_size)
    levels = recipe.levels.values()
    drawn = sum(level.batch_size * level.num_views * level.steps_per_cycle for level in levels)
    return Speed(
        cluster,
        compute=sum(cycle.flops.values()) / peak,
        communication=sum(moved.values()) / cluster.link,
        moved=moved,
        images_per_cycle=recipe.pretrain.batch_size * recipe.pretrain.steps_per_cycle,
        drawn_per_cycle=drawn,
    )


def moved_bytes(cycle: Cycle, world_size: int) -> dict[str, float]:
    """Bytes that one of so many ranks sends over a ring in each phase of a cycle.

    Of a tensor of S bytes an all-reduce sends 2 S (n - 1) / n, an all-gather or a reduce-scatter
    that makes or takes it S (n - 1) / n.
    """
    moved: dict[str, float] = {}
    for (phase, kind), num_bytes in cycle.sent.items():
        share = _TIMES_MOVED.get(kind, 1) * (world_size - 1) / world_size
        moved[phase] = moved.get(phase, 0.0) + share * num_bytes
    return moved
