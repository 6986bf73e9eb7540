"""A folder that two launches want: one has it, the other is refused and changes nothing."""

from pathlib import Path

import pytest

from tests.faults.runs import Runs

BACKWARD = "mlomae.hypergrad.level.Level.backward"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_launch_is_refused(runs: Runs, tmp_path: Path, resume: bool) -> None:
    """The first one stands in its third cycle until the second has ended."""
    run, go = f"second {resume}", tmp_path / "go"
    fault = ("wait_for", {"place": BACKWARD, "call": 8, "file": str(go)})
    with runs.launch(run, faults={0: [fault]}) as first:
        first.until(lambda: runs.newest(run) > 0)
        with runs.launch(run, resume=resume) as second:
            assert second.finish()[0] == 2, second.output
            reason = "is in use by another launch (host " if resume else "holds another run"
            assert f"output_dir {runs.folder / run} {reason}" in second.error(0)
        go.touch()
        assert first.finish() == [0, 0], first.output
    runs.assert_equal(run)


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_launches_at_once_one_trains(runs: Runs, resume: bool) -> None:
    run = f"both {resume}"
    with runs.launch(run, resume=resume) as one, runs.launch(run, resume=resume) as other:
        outcomes = [(launch.finish(), launch) for launch in (one, other)]
    (loser,) = (launch for codes, launch in outcomes if codes != [0, 0])
    (codes,) = (codes for codes, launch in outcomes if launch is loser)
    assert codes[0] == 2, loser.output
    assert f"output_dir {runs.folder / run} " in loser.error(0)
    runs.assert_equal(run)
