"""Runs that end before their time: by a signal, a rank that hangs, numbers, data, a full disk."""

import shutil
import signal
from pathlib import Path

import pytest

from mlomae.distributed.watchdog import EX_TEMPFAIL
from tests.faults.runs import Runs
from tests.runs import mounted_tmpfs

LEVEL, WRITER = "mlomae.hypergrad.level.Level", "mlomae.checkpoint.writer"
BACKWARD, SYNC = f"{LEVEL}.backward", f"{WRITER}._sync"


@pytest.mark.parametrize(("stage", "rank"), [(1, 1), (3, 0)])
def test_sigterm_to_one_rank_saves_on_all(runs: Runs, stage: int, rank: int) -> None:
    run = f"sigterm{stage}"
    with runs.launch(run, stage=stage) as launch:
        launch.until(lambda: " INFO cycle 2 " in launch.logs[0].read_text())
        launch.send(rank, signal.SIGTERM)
        assert launch.finish() == [143, 143], launch.output
        assert "stopped by SIGTERM after saving" in launch.output
    assert runs.newest(run) >= 2
    assert f"step_{2 * runs.newest(run):08d}" in runs.finish(run, stage=stage)
    runs.assert_equal(run, stage)


@pytest.mark.parametrize("place", [BACKWARD, pytest.param(SYNC, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named(runs: Runs, place: str) -> None:
    """In a step, and in the thread that writes."""
    run, fault = f"hang in {place}", ("hang", {"place": place, "call": 8})
    with runs.launch(run, "monitor.hang_timeout=6", faults={1: [fault]}) as launch:
        assert EX_TEMPFAIL in launch.finish(), launch.output
        assert launch.output.count("error: hang: rank 1 on ") == 1
    runs.finish(run)
    runs.assert_equal(run)


def test_numbers_that_break_down_on_one_rank_end_all(runs: Runs) -> None:
    """Three steps in a row are skipped, the third in cycle 4; cycle 2 was the last one saved."""
    run, sparse = "nan", "checkpoint.interval_epochs=1"
    fault = ("spoil", {"place": f"{LEVEL}.evaluate", "call": 15})
    with runs.launch(run, sparse, faults={1: [fault]}) as launch:
        assert launch.finish() == [1, 1], launch.output
        assert "error: pretrain: loss or gradient was not finite for 3 steps" in launch.output
    assert runs.newest(run) == 2
    runs.finish(run)
    runs.assert_equal(run)


def test_images_that_are_cut_short_while_training_are_named(runs: Runs) -> None:
    beton, run = runs.folder / "cut.beton", "cut"
    shutil.copy(runs.beton, beton)
    fault = ("truncate", {"place": "mlomae.training.task.Task.draw", "call": 9, "file": str(beton)})
    with runs.launch(run, f"data.train={beton}", faults={0: [fault]}) as launch:
        assert 2 in (codes := launch.finish()), launch.output
        assert f"{beton} has shrunk" in launch.error(codes.index(2))
    shutil.copy(runs.beton, beton)
    runs.finish(run, f"data.train={beton}")
    runs.assert_equal(run)


def test_a_disk_that_fills_up_in_a_save_keeps_what_is_saved(runs: Runs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted_tmpfs(disk, 2**25) as problem:
        if problem:
            pytest.skip(f"no small disk here: {problem}")
        run, ballast = str(disk / "run"), disk / "ballast"
        fault = (
            "fill",
            {"place": f"{WRITER}.save_tensors", "call": 14, "file": str(ballast)},
        )
        with runs.launch(run, faults={0: [fault]}) as launch:
            assert launch.finish() == [2, 2], launch.output
            assert "step_00000006 could not be written (rank 0: " in launch.error(0)
            assert "No space left on device" in launch.error(0)
        assert runs.newest(run) == 2
        ballast.unlink()
        runs.finish(run)
        runs.assert_equal(run)
