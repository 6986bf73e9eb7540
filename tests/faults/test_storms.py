"""Ranks that are killed at random moments, again and again: the run ends as if it had not been."""

import os
import random
import signal
from typing import Any

import pytest

from tests.faults.runs import Runs

NUM_CYCLES = 16
SEED = int(os.environ.get("STORM_SEED", random.SystemRandom().randrange(10**6)))
# On a slow disk, a save takes longer than the next cycle.
SLOW_DISK = ("delay", {"place": "mlomae.checkpoint.writer.save_tensors", "seconds": 0.03})
# ZeRO stage, checkpoint.async_save, number of kills
STORMS = [
    (1, "true", 10),
    (3, "false", 10),
    pytest.param(2, "false", 30, marks=pytest.mark.slow),
    pytest.param(3, "true", 30, marks=pytest.mark.slow),
]


def is_killed(runs: Runs, run: str, draw: random.Random, *overrides: str, **options: Any) -> bool:
    """Resume, and kill a rank: mostly while a cycle trains or is saved, sometimes at the start.

    Returns:
        Whether it was killed; else the run had come to its end before.
    """
    with runs.launch(run, *overrides, resume=True, **options) as launch:
        rank, is_early, share = draw.randrange(2), draw.random() < 0.25, draw.random()
        if not is_early:
            launch.until(lambda: " INFO cycle " in launch.logs[0].read_text())
        launch.settle(share * (1.2 if is_early else 0.6))
        launch.send(rank, signal.SIGKILL)
        codes = launch.finish()
        assert codes[rank] == -signal.SIGKILL or codes == [0, 0], launch.output
        return any(codes)


def survive(
    runs: Runs, run: str, num_kills: int, draw: random.Random, override: str, stage: int
) -> int:
    """Kill a run's ranks so often, then let it end; return how often its length allowed."""
    options = {"stage": stage, "num_cycles": NUM_CYCLES}
    faults = {0: [SLOW_DISK], 1: [SLOW_DISK]}
    num_done = saved = 0
    while num_done < num_kills and is_killed(runs, run, draw, override, faults=faults, **options):
        num_done += 1
        assert runs.newest(run) >= saved  # what is saved is never lost
        saved = runs.newest(run)
    output = runs.finish(run, override, **options)
    if num_done == num_kills and saved:
        assert "resumed from" in output
    runs.assert_equal(run, **options)
    return num_done


@pytest.mark.parametrize(("stage", "async_save", "num_kills"), STORMS)
def test_a_storm_of_kills_changes_no_bit(
    runs: Runs, stage: int, async_save: str, num_kills: int
) -> None:
    """A run that ends before it was killed often enough is followed by another."""
    print(f"STORM_SEED={SEED}")
    draw, num_runs, override = random.Random(SEED), 0, f"checkpoint.async_save={async_save}"
    while num_kills > 0:
        run = f"storm{stage}_{async_save}_{num_runs}"
        num_kills -= survive(runs, run, num_kills, draw, override, stage)
        num_runs += 1
