"""A rank that is killed at a chosen place: in a step, a hypergradient, a save, at start and end.

Each launch goes on from where the one before it was killed, and the run ends as if none had been.
"""

import signal

import pytest

from tests.faults.ranks import Fault
from tests.faults.runs import Runs, step_name

LEVEL, MULTILEVEL = "mlomae.hypergrad.level.Level", "mlomae.hypergrad.multilevel"
WRITER = "mlomae.checkpoint.writer"

# A cycle has two steps of pretrain with two micro-batches each, one of classifier, and one of mask
# whose hypergradient takes three gradients and evaluates two losses; AdamW steps pretrain and mask,
# each in two groups of weights.
# (rank, what befalls it, its place, at which call: all in the launch's second cycle)
STEPS = [
    (1, "kill_after", f"{LEVEL}.evaluate", 7 + 2),  # before the second backward pass
    (0, "kill", f"{LEVEL}.apply", 4 + 2),  # between gradient and optimizer step
    (1, "kill_after", "torch.optim.AdamW.step", 6 + 1),  # one group of weights has stepped, one not
    (1, "kill", f"{MULTILEVEL}.GradientSink.take", 3 + 2),
    (0, "kill", f"{MULTILEVEL}.GradientSink.take", 3 + 3),
]
# (rank, what befalls it, its place, the file, at which call; cycles that are saved afterwards)
ENDS = [
    (0, "kill_in_file", "pathlib.Path.write_text", "recipe.yaml", 1, 0),
    (0, "kill", "mlomae.training.monitor.Monitor.write", "", 2, 1),
    (1, "kill", "mlomae.checkpoint.load", "", 1, 1),
    (0, "kill", "os.replace", "metrics.jsonl", 1, 1),
    (0, "kill", "mlomae.training.trainer.write_report", "", 1, 6),
    (0, "kill", "pathlib.Path.replace", "summary.json.tmp", 1, 6),
]
# (rank, what befalls it, its place, the file; whether the checkpoint is complete before it)
SAVES = [
    (0, "kill_in_file", f"{WRITER}.save_tensors", "model.safetensors", False),
    (1, "kill_in_file", f"{WRITER}.save_tensors", "mask/shards_00001.safetensors", False),
    (1, "kill", f"{WRITER}.sync", "classifier/shards_00001.safetensors", False),
    (0, "kill_in_file", f"{WRITER}.sync", "state.json", False),
    (0, "kill", "pathlib.Path.rename", "{step}.tmp", False),
    (0, "kill_after", "pathlib.Path.rename", "{step}.tmp", True),
    (0, "kill", "pathlib.Path.replace", "latest.tmp", True),
    (0, "kill_after", "os.unlink", ".safetensors", True),  # in the removal of an older one
]


def kill(runs: Runs, run: str, stage: int, rank: int, fault: Fault, *overrides: str) -> None:
    """Resume a run whose rank is killed as `fault` says."""
    with runs.launch(run, *overrides, stage=stage, faults={rank: [fault]}, resume=True) as launch:
        assert launch.finish()[rank] == -signal.SIGKILL, (fault, launch.output)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_kills_in_steps_change_no_bit(runs: Runs, stage: int) -> None:
    run = f"steps{stage}"
    for num_saved, (rank, name, place, call) in enumerate(STEPS, 1):
        fault = name, {"place": place, "call": call}
        kill(runs, run, stage, rank, fault, "checkpoint.async_save=false")
        assert runs.newest(run) == num_saved, fault
    runs.finish(run, stage=stage)
    runs.assert_equal(run, stage)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kills_in_saves_change_no_bit(runs: Runs, stage: int) -> None:
    run, num_saved = f"saves{stage}", 0
    for rank, name, place, path, is_complete in SAVES:
        values = {"place": place, "call": 1, "path": path.format(step=step_name(num_saved + 1))}
        kill(runs, run, stage, rank, (name, values), "checkpoint.keep=1")
        num_saved += is_complete
        assert runs.newest(run) == num_saved, (place, path)
    runs.finish(run, stage=stage)
    runs.assert_equal(run, stage)


def test_kills_at_start_and_end_change_no_bit(runs: Runs) -> None:
    run = "ends"
    for rank, name, place, path, call, num_saved in ENDS:
        values = {"place": place, "call": call, "path": path}
        kill(runs, run, 2, rank, (name, values), "checkpoint.async_save=false")
        assert runs.newest(run) == num_saved, (place, path)
    runs.finish(run)
    runs.assert_equal(run)
