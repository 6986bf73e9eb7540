"""What it takes to differentiate an optimizer step afterwards, and what comes of a sweep."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlomae.hypergrad.adjoints import ShardStep, state_keys
from mlomae.hypergrad.kept import KeptCalls
from mlomae.hypergrad.partition import Partition, Vector
from mlomae.hypergrad.randomness import RandomState


@dataclass
class MicroBatch:
    """What it takes to evaluate a level's loss once more as it was."""

    batch: Any
    random_state: RandomState
    modes: dict[str, list[bool]]  # of each level's submodules
    frozen: Any = None  # of a `WeightedLoss`
    kept: KeptCalls | None = None  # of the levels below, until they are used


@dataclass
class StepRecord:
    """What it takes to differentiate one optimizer step, as shards.

    Attributes:
        weights: the weights before the step, in compute precision.
        micro_batches: what the gradient was computed on.
        moves: how many steps each level's weights had taken before this one, by level name: those
            of the level itself and of the levels that its loss read.
        norm: global norm of the gradient before clipping; 0 when nothing is clipped.
        steps: what the optimizer did, by shard; empty when an engine skipped the step.
    """

    weights: Vector
    micro_batches: list[MicroBatch]
    moves: dict[str, int]
    norm: float
    steps: dict[int, ShardStep] = field(default_factory=dict)


def make_room(windows: Iterable[deque[StepRecord]]) -> None:
    """Prepare windows of recorded steps for one more, before it is taken.

    A full window's oldest record goes, so that the step can use its memory, and the newest one
    copies what the optimizer remembers, which the step is about to change.
    """
    newest = {}
    for records in windows:
        if len(records) == records.maxlen:
            records.popleft()
        if records:
            newest[id(records[-1])] = records[-1]  # several windows may share it
    for record in newest.values():
        _keep_state(record)


@contextmanager
def recording(
    partition: Partition,
    micro_batches: list[MicroBatch],
    moves: dict[str, int],
    *,
    clips: bool,
    owns_gradients: bool,
) -> Iterator[StepRecord]:
    """Record the one optimizer step taken inside. All ranks must enter.

    Args:
        micro_batches, moves: as `StepRecord` has them.
        clips: whether the gradient is clipped by its global norm.
        owns_gradients: whether nobody writes into the gradients after the step.
    """
    norm = partition.gradient_norm() if clips else 0.0
    record = StepRecord(partition.weights(), micro_batches, moves, norm)
    with _noted_gradients(partition, record, owns_gradients):
        yield record
    shards = partition.shards()
    for i, step in record.steps.items():
        # In place, not copied: `_keep_state` copies it when another step is about to change it.
        state = partition.optimizer.state[shards[i]]
        names = state_keys(partition.optimizer)
        step.state = {key: state[key].flatten() for key in names if key in state}
        step.state["step"] = float(state.get("step", 0))


@contextmanager
def _noted_gradients(
    partition: Partition, record: StepRecord, owns_gradients: bool
) -> Iterator[None]:
    index = {id(shard): i for i, shard in enumerate(partition.shards())}
    all_groups = partition.optimizer.param_groups
    groups = {id(p): i for i, group in enumerate(all_groups) for p in group["params"]}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO-1 and 2 step one group at a time and show no other, ZeRO-3 one sub-group, which it
        # puts into its group for the while.
        for i, group in enumerate(optimizer.param_groups):
            settings = {
                # A rate may be a tensor, which its schedule fills anew.
                k: v.item() if isinstance(v, Tensor) else v
                for k, v in group.items()
                if k != "params"
            }
            for shard in group["params"]:
                if shard.grad is not None:
                    grad = shard.grad.detach().flatten()
                    record.steps[index[id(shard)]] = ShardStep(
                        grad if owns_gradients else grad.clone(),
                        settings,
                        groups.get(id(shard), i),
                        is_first=not optimizer.state.get(shard),
                    )

    handle = partition.optimizer.register_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _keep_state(record: StepRecord) -> None:
    for step in record.steps.values():
        state = step.state.items()
        step.state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state}


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative of an upper level's loss by its own weights.

    Attributes:
        loss: the upper level's loss on this rank, detached.
        vector: the derivative, averaged over ranks, as shards.
    """

    loss: Tensor
    vector: Vector
