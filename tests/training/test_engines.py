"""Levels on engines: rates in closed form, and steps that no rank takes on bad numbers of one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_ranks

STAGES = (0, 1, 2, 3)
TOTAL, WARMUP, LR, MIN_LR = 12, 4, 0.1, 0.01


def build(stage: int, **changes: Any) -> Any:
    from mlomae.recipe import LevelRecipe
    from mlomae.training.engines import build_level

    torch.manual_seed(0)
    config = {
        "train_batch_size": 2 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }
    settings = {"batch_size": 2 * dist.get_world_size(), "lr": LR, "min_lr": MIN_LR} | changes
    return build_level(
        "head",
        nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
        LevelRecipe(**settings),
        config,
        loss=lambda models, batch: models["head"](batch).square().mean(),
        total_steps=TOTAL,
        warmup_steps=WARMUP,
    )


def state(level: Any) -> list[Tensor]:
    """This rank's weights, and what the optimizer remembers of them."""
    shards = level.partition.shards()
    memory = [level.optimizer.state[shard] for shard in shards]
    moments = [entry[key] for entry in memory for key in ("exp_avg", "exp_avg_sq") if key in entry]
    return [tensor.detach().clone() for tensor in (*shards, *moments)]


def behaviour(stages: tuple[int, ...]) -> list[dict[str, Any]]:
    """Of a level at each stage: a good step, three in which the last rank sees a NaN, the end."""
    from mlomae.training.engines import NonFiniteError

    outcomes = []
    for stage in stages:
        level = build(stage)
        images = torch.ones(2, 3)
        bad = images * math.nan if dist.get_rank() == dist.get_world_size() - 1 else images
        level.step(images)
        before, message = state(level), ""
        for number in range(3):
            try:
                level.step(bad)
            except NonFiniteError as error:
                message = f"{number}: {error}"
        is_untouched = all(map(torch.equal, before, state(level)))
        counters = level.counters()
        level.num_skipped = 0
        level.step(images)
        outcomes.append(
            {
                "message": message,
                "untouched": is_untouched,
                "moved": not torch.equal(before[0], state(level)[0]),
                "counters": (counters["num_steps"], counters["num_skipped"]),
                "after": (level.num_steps_done, level.num_skipped),
            }
        )
        level.engine.destroy()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(f"{__name__}:behaviour", 2, tmp_path_factory.mktemp("guard"), stages=STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_number_on_one_rank_stops_the_step_on_all(outcomes: Any, stage: int) -> None:
    for rank in range(2):
        outcome = outcomes[rank][stage]
        assert outcome["untouched"] and outcome["moved"]
        assert outcome["counters"] == (4, 3)
        assert outcome["after"] == (5, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_third_in_a_row_ends_the_run_in_a_sentence(outcomes: Any, stage: int) -> None:
    for rank in range(2):
        message = outcomes[rank][stage]["message"]
        assert message.startswith("2: head: loss or gradient was not finite for 3 steps in a row")
        assert "lower head.lr" in message


def rates(schedules: tuple[str, ...]) -> dict[str, Any]:
    """The rate of every step by schedule, the groups' decay, and a level that counts on."""
    found: dict[str, Any] = {}
    for schedule in schedules:
        level = build(0, schedule=schedule, weight_decay=0.3)
        found[schedule] = []
        for _ in range(TOTAL):
            level.step(torch.ones(2, 3))
            found[schedule].append(level.lr)
    found["decay"] = [
        (group["weight_decay"], sorted(tuple(p.shape) for p in group["params"]))
        for group in level.optimizer.param_groups
    ]
    resumed = build(0, schedule=schedules[-1])
    counters = {**level.counters(), "num_steps": 7, "global_steps": 6}
    resumed.set_counters(**counters)
    resumed.step(torch.ones(2, 3))
    found["resumed"] = (resumed.lr, resumed.num_steps_done, resumed.engine.global_steps)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rates")
    (outcome,) = run_ranks(f"{__name__}:rates", 1, folder, schedules=("linear", "cosine"))
    return outcome


def expected(schedule: str, step: int) -> float:
    """The rate in closed form: a line up, then half a cosine or a line down to MIN_LR."""
    if step < WARMUP:
        return LR * step / WARMUP
    share = (step - WARMUP) / (TOTAL - WARMUP)
    height = (1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else 1 - share
    return MIN_LR + (LR - MIN_LR) * height


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_are_those_of_the_formula(measured: dict[str, Any], schedule: str) -> None:
    wanted = [expected(schedule, step) for step in range(TOTAL)]
    assert measured[schedule] == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_biases_and_norms_do_not_decay(measured: dict[str, Any]) -> None:
    assert sorted(measured["decay"]) == [(0.0, [(2,), (5,), (5,), (5,)]), (0.3, [(2, 5), (5, 3)])]


def test_a_resumed_level_counts_on(measured: dict[str, Any]) -> None:
    assert measured["resumed"] == (pytest.approx(expected("cosine", 7)), 8, 7)


def cycled(stages: tuple[int, ...]) -> list[tuple[int, int, int, bool]]:
    """Two cycles on engines: steps done and skipped of the upper level, and whether it moved."""
    from mlomae.hypergrad import Multilevel
    from mlomae.recipe import LevelRecipe
    from mlomae.training.engines import build_level

    outcomes = []
    for stage in stages:
        world_size = dist.get_world_size()
        config = {
            "train_batch_size": 2 * world_size,
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage},
        }
        recipe = LevelRecipe(batch_size=2 * world_size, lr=LR)
        torch.manual_seed(0)
        networks = nn.Linear(3, 2), nn.Linear(3, 2)

        def lower(models: Any, x: Tensor) -> Tensor:
            return (models["train"](x) * models["theta"](x).exp()).square().mean()

        def upper(models: Any, x: Tensor) -> Tensor:
            return (models["train"](x) - 1).square().mean()

        levels = [
            build_level(name, net, recipe, config, loss=loss, total_steps=9, warmup_steps=0, **of)
            for name, net, loss, of in (
                ("train", networks[0], lower, {"upper": ("theta",)}),
                ("theta", networks[1], upper, {"lower": ("train",)}),
            )
        ]
        problem, theta = Multilevel(levels), levels[1]
        before = [shard.clone() for shard in theta.partition.shards()]
        batches = {name: iter(torch.ones(2, 2, 3)) for name in problem.levels}
        losses = [problem.cycle(batches) for _ in range(2)]
        moved = any(map(lambda a, b: not torch.equal(a, b), before, theta.partition.shards()))
        assert theta.latest_loss == float(losses[-1]["theta"])
        outcomes.append((stage, theta.num_steps_done, theta.num_skipped, moved))
        for level in levels:
            level.engine.destroy()
    return outcomes


def test_a_cycle_of_a_problem_steps_every_level(tmp_path: Path) -> None:
    for rank in run_ranks(f"{__name__}:cycled", 2, tmp_path, stages=STAGES):
        assert rank == [(stage, 2, 0, True) for stage in STAGES]
