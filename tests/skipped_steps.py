"""What a task keeps besides its levels, around a step that is skipped and one without loss."""

import itertools
import math
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor


def kept(task: Any) -> dict[str, Tensor]:
    """Copies of the task's averages, and of what else its checkpoints hold, on this rank."""
    tensors = {**task.shared_state(), **task.rank_state()}
    for vectors in task.vectors().values():
        for kind, shards in vectors.items():
            tensors |= {f"{kind}{i}": shard for i, shard in enumerate(shards)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def around(task: Any) -> dict[str, list[str]]:
    """Names of what a task changed on this rank in two of four cycles. All ranks must call.

    The first two cycles are like any, and take averages away from the weights; in the third the
    last rank alone sees a gradient that is not finite; in the fourth the last rank's loss is
    exactly 0, which is no reason to skip.
    """
    level, is_last = task.first_level, dist.get_rank() == dist.get_world_size() - 1
    norm, backward = level.partition.gradient_norm, level.backward

    def bad_norm() -> float:
        value: float = norm()
        return math.nan if is_last else value

    def no_loss(*micro_batches: Any) -> Tensor:
        loss: Tensor = backward(*micro_batches)
        return loss * 0 if is_last else loss

    task.cycle()
    task.cycle()
    states = [kept(task)]
    with mock.patch.object(level.partition, "gradient_norm", bad_norm):
        task.cycle()
    states.append(kept(task))
    assert level.num_skipped == 1
    with mock.patch.object(level, "backward", no_loss):
        task.cycle()
    states.append(kept(task))
    assert level.num_skipped == 0
    changes = [
        sorted(name for name in before if not torch.equal(before[name], after[name]))
        for before, after in itertools.pairwise(states)
    ]
    return {"all": sorted(states[0]), "skipped": changes[0], "without loss": changes[1]}
