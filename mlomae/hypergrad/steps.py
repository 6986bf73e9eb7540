"""Walking back over the recorded optimizer steps of a level."""

import torch
from torch import Tensor

from mlomae.hypergrad.adjoints import ShardAdjoint, adjoint_of, through_clipping
from mlomae.hypergrad.level import Binding, Level
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.products import Sinks
from mlomae.hypergrad.records import StepRecord
from mlomae.hypergrad.twin import running


def newest(binding: Binding, num: int) -> list[StepRecord]:
    """The newest records of a level, oldest first.

    Raises:
        RuntimeError: it has taken fewer steps in this cycle.
        ValueError: a level has moved in another way since, so that they lead astray.
    """
    name, records = binding.level.name, list(binding.records)[-num:]
    if len(records) < num:
        raise RuntimeError(
            f"level {name} has taken {len(records)} recorded steps in this cycle, but {num} are "
            "needed; step it before the hypergradient"
        )
    _check_unmoved(binding, records)
    return records


def _check_unmoved(binding: Binding, records: list[StepRecord]) -> None:
    """Refuse records that a level has moved away from: a sweep reads the weights as they are."""
    name = binding.level.name
    for age, record in enumerate(reversed(records), 1):
        expected = record.moves | {name: record.moves[name] + age}
        moved = [other for other, num in binding.moves().items() if num != expected[other]]
        if name in moved:
            raise ValueError(
                f"level {name} has taken a step that is not recorded for this problem, after one "
                "that is, so the hypergradient would be wrong; clear() the problem, and take all "
                "steps of a cycle for it"
            )
        if moved:
            raise ValueError(
                f"level {moved[0]} has taken a step since the recorded steps of level {name}, "
                "which read its weights, so the hypergradient would be wrong; take it before that "
                f"step, or clear() the problem and step level {name} again"
            )


def through_step(
    binding: Binding,
    record: StepRecord,
    shards: list[ShardAdjoint],
    sinks: Sinks,
    *,
    is_oldest: bool,
) -> Vector:
    """Pass one recorded step of all shards. All ranks must call.

    Args:
        binding: of the level whose step it was.
        record: the step.
        shards: adjoints after the step; become those before it, without the Hessian product.
        sinks: take the derivative by the step's settings, where the level has some.
        is_oldest: no step is passed after this one, so that the adjoints can go.

    Returns:
        The cotangent of the step's gradient as it was before clipping.
    """
    level = binding.level
    adjoint = adjoint_of(level.optimizer)
    with_settings = level.settings is not None
    needs_weight = with_settings or type(level.optimizer) is torch.optim.Adam
    cotangent = []
    for i, shard in enumerate(shards):
        if i not in record.steps:  # the optimizer left it alone
            cotangent.append(torch.zeros_like(shard.weight))
            continue
        weight = record.weights[i].to(shard.weight) if needs_weight else None
        cotangent.append(adjoint(shard, record.steps[i], weight, with_settings=with_settings))
        if is_oldest:
            shard.let_go()
    if with_settings:
        _through_settings(binding, record, shards, sinks)
    return _through_clipping(level, record, cotangent)


def _through_clipping(level: Level, record: StepRecord, cotangent: Vector) -> Vector:
    if not 0 < level.max_norm < record.norm:
        return cotangent
    zeros = level.partition.zeros()
    grads = [record.steps[i].grad if i in record.steps else z for i, z in enumerate(zeros)]
    inner = level.partition.dot(grads, cotangent)
    return [
        through_clipping(c, g, inner, norm=record.norm, max_norm=level.max_norm)
        for c, g in zip(cotangent, grads, strict=True)
    ]


def _through_settings(
    binding: Binding, record: StepRecord, shards: list[ShardAdjoint], sinks: Sinks
) -> None:
    """Backpropagate the derivative by learning rates and decays to the levels they depend on."""
    level = binding.level
    assert level.settings is not None
    with running(binding.weights_of_others(sinks), record.micro_batches[-1].modes) as models:
        settings = level.settings(models)
    total = torch.zeros((), device=level.partition.device)
    for i, values in enumerate(settings):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.requires_grad:
                total = total + value * _sum_over_group(level, record, shards, i, key)
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]


def _sum_over_group(
    level: Level, record: StepRecord, shards: list[ShardAdjoint], group: int, key: str
) -> float:
    vector = level.partition.zeros()
    for i, step in record.steps.items():
        if step.group == group:
            vector[i] = shards[i].by_setting[key]
    return level.partition.dot(vector, [torch.ones_like(v) for v in vector])
