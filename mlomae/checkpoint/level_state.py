"""A level's state in pieces that name their parameter and place.

ZeRO cuts weights and optimizer memory anew for each stage and number of ranks. Written piece by
piece under the parameters' names, they can be put together again for any other cut, and a rank
that finds its own cut unchanged reads its own file alone.

Keys of a file:

    master/NAME@START       fp32 weights of parameter NAME from element START on
    exp_avg/NAME@START      what the optimizer remembers of them, under the optimizer's names
    average/NAME@START      another vector in weight space that the task keeps
    step/NAME               how often the optimizer has stepped the parameter
    buffer/NAME             first rank alone: persistent buffers
    frozen/NAME             first rank alone: parameters that are not trained, whole
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlomae.distributed.collectives import first_problem
from mlomae.distributed.watchdog import mark
from mlomae.hypergrad.partition import Partition, Vector, view

MASTER = "master"


class StoredLevel(Protocol):
    """What a checkpoint needs of a level: a `mlomae.hypergrad.Level` on an engine that counts."""

    partition: Partition
    model: Any
    dtype: torch.dtype
    num_steps_done: int

    def counters(self) -> dict[str, int]:
        """What a resumed level has to count on from."""

    def set_counters(self, num_steps: int, num_skipped: int, global_steps: int) -> None:
        """Count on from there."""


def pieces(level: StoredLevel, vectors: Mapping[str, Vector]) -> dict[str, Tensor]:
    """This rank's part of a level's state, by key; views where that is possible.

    All ranks must call.

    Args:
        vectors: what else is cut as the weights are, by name.
    """
    partition = level.partition
    tensors: dict[str, Tensor] = {}
    if partition.is_sharded or dist.get_rank() == 0:
        shards = partition.shards()
        for fragment in partition.fragments:
            shard = shards[fragment.shard]
            kinds = {MASTER: shard, **optimizer_state(partition, shard)}
            kinds |= {kind: vector[fragment.shard] for kind, vector in vectors.items()}
            for kind, whole in kinds.items():
                piece = whole.detach().flatten()[fragment.shard_start :][: fragment.numel]
                tensors[f"{kind}/{fragment.name}@{fragment.param_start}"] = piece
            if (step := partition.optimizer.state[shard].get("step")) is not None:
                tensors[f"step/{fragment.name}"] = torch.tensor([float(step)], dtype=torch.float64)
    frozen = partition.current(list(partition.frozen)) if partition.frozen else {}
    if dist.get_rank() == 0:
        tensors |= {f"frozen/{name}": tensor for name, tensor in frozen.items()}
        tensors |= {f"buffer/{name}": buffer.detach() for name, buffer in _buffers(level).items()}
    return tensors


def optimizer_state(partition: Partition, shard: Tensor) -> dict[str, Tensor]:
    """What the optimizer remembers of every weight of a shard; empty before its first step."""
    return {
        name: value
        for name, value in partition.optimizer.state[shard].items()
        if name != "step" and isinstance(value, Tensor) and value.numel() == shard.numel()
    }


def optimizer_state_keys(level: StoredLevel) -> list[str]:
    """Names of what the optimizer remembers, on this rank."""
    partition = level.partition
    return sorted(
        {kind for shard in partition.shards() for kind in optimizer_state(partition, shard)}
    )


@torch.no_grad()
def restore(
    level: StoredLevel, vectors: Mapping[str, Vector], kinds: Sequence[str], folder: Path
) -> None:
    """Take back what all ranks wrote, however many they were. All ranks must call.

    Args:
        vectors: as `pieces` had them; filled in place.
        kinds: what the optimizer remembered.
        folder: of the files `shards_RRRRR.safetensors`.

    Raises:
        ValueError: some rank cannot read a file, or finds a weight in none, on all ranks.
    """
    partition = level.partition
    shards = [shard.detach().flatten() for shard in partition.shards()]
    memory = {kind: partition.zeros() for kind in kinds}
    filled = _Filled(partition, {MASTER: shards, **vectors, **memory})
    files = sorted(folder.glob("shards_*.safetensors"))
    rank = dist.get_rank()
    problem = None
    try:
        for file in [*files[rank : rank + 1], *files[:rank], *files[rank + 1 :]]:
            mark(f"reading {file.parent.name}/{file.name}")
            filled.read(file)
            if filled.is_complete:  # as after the first one, where nothing is cut anew
                break
        filled.check({MASTER, *vectors})
        _restore_optimizer_state(partition, memory, filled)
        _restore_whole(level, files[0])
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        problem = str(error)
    if failed := first_problem(problem):
        raise ValueError("rank {}: {}".format(*failed))
    partition.refresh()


class _Filled:
    """Vectors that are filled from files, and what of them is still missing.

    Attributes:
        filled: keys KIND/NAME of which some file had something.
        steps: how often the optimizer had stepped each parameter, as far as the files said.
    """

    def __init__(self, partition: Partition, vectors: Mapping[str, Vector]) -> None:
        self._targets: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for kind, vector in vectors.items():
            for fragment in partition.fragments:
                target = fragment.param_start, view(vector, fragment)
                self._targets[f"{kind}/{fragment.name}"].append(target)
        self._missing = {
            key: sum(len(target) for _, target in targets) for key, targets in self._targets.items()
        }
        self.filled: set[str] = set()
        self.steps: dict[str, float] = {}

    @property
    def is_complete(self) -> bool:
        """Whether no file has more to give."""
        return not any(self._missing.values())

    def read(self, file: Path) -> None:
        """Copy what a file holds of the vectors."""
        with safe_open(file, framework="pt") as tensors:
            for entry in tensors.keys():  # noqa: SIM118 - not a dictionary
                key, _, start = entry.rpartition("@")
                if key in self._targets:
                    self._copy(key, int(start), tensors.get_slice(entry))
                elif entry.startswith("step/"):
                    self.steps[entry.removeprefix("step/")] = float(tensors.get_tensor(entry))

    def _copy(self, key: str, start: int, piece: Any) -> None:
        stop = start + piece.get_shape()[0]
        for target_start, target in self._targets[key]:
            first, last = max(start, target_start), min(stop, target_start + len(target))
            if first < last:
                part = piece[first - start : last - start]
                target[first - target_start : last - target_start].copy_(part)
                self._missing[key] -= last - first
                self.filled.add(key)

    def check(self, kinds: Collection[str]) -> None:
        """Raise for a weight that no file had; what never was stepped has no memory, though."""
        for key, number in self._missing.items():
            if number and key.partition("/")[0] in kinds:
                raise ValueError(f"{number} values of {key} are in none of its files")


def _restore_optimizer_state(
    partition: Partition, memory: Mapping[str, Vector], filled: _Filled
) -> None:
    """Make the optimizer remember, where the files say that it did."""
    optimizer = partition.optimizer
    counts_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for index, shard in enumerate(partition.shards()):
        names = [fragment.name for fragment in partition.fragments if fragment.shard == index]
        state = {
            kind: vector[index].view_as(shard)
            for kind, vector in memory.items()
            if any(f"{kind}/{name}" in filled.filled for name in names)
        }
        if steps := [filled.steps[name] for name in names if name in filled.steps]:
            device = shard.device if counts_on_device else "cpu"
            state["step"] = torch.tensor(max(steps), dtype=torch.float32, device=device)
        if state:
            optimizer.state[shard] = state


def _restore_whole(level: StoredLevel, file: Path) -> None:
    """Buffers and untrained parameters, which the first rank wrote for all."""
    partition, buffers = level.partition, _buffers(level)
    with safe_open(file, framework="pt") as tensors:
        for name, buffer in buffers.items():
            buffer.copy_(tensors.get_tensor(f"buffer/{name}"))
        for name in partition.frozen:
            partition.set_frozen(name, tensors.get_tensor(f"frozen/{name}"))


def _buffers(level: StoredLevel) -> dict[str, Tensor]:
    """What the module's own state holds besides parameters."""
    module = level.model.module
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
