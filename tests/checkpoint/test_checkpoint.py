"""Which checkpoints are kept, replaced, ignored, and what a disk that fills up leaves of them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import Setup, checkpoints, contents, metrics_rows, mounted_tmpfs

EVERY_CYCLE = "checkpoint.interval_epochs=0.4"  # 2 steps each, 8 in all
KEEP_ALL = "checkpoint.keep=9"


@pytest.fixture(scope="module")
def setup(module_setup: Setup) -> Setup:
    return module_setup


# (ZeRO stage, rank whose disk is full, what it cannot write)
FULL = [
    (0, 0, ("pretrain", "shards_00000")),
    (2, 1, ("pretrain", "shards_00001")),
    (3, 1, ("random_00001",)),
]


@pytest.fixture(scope="module")
def small_disk(setup: Setup) -> Iterator[tuple[Path, str]]:
    """A disk of 8 MiB, and why there is none (or an empty text)."""
    disk = setup.folder / "small"
    with mounted_tmpfs(disk, 2**23) as problem:
        yield disk, problem


@pytest.fixture(scope="module")
def outcomes(setup: Setup, small_disk: tuple[Path, str]) -> dict[str, list[tuple[int, str]]]:
    """Exit code and stderr of every launch on both ranks."""
    cd = f"cd {setup.folder}"
    # as a run looks that was killed long after its last checkpoint, while it wrote the next
    unfinished = "rm killed/summary.json; mkdir killed/checkpoints/step_00000099.tmp"
    killed = f"{cd}; cp -r kept killed; rm -r killed/checkpoints/step_00000008; {unfinished}"
    unsaved = f"{cd}; cp -r kept unsaved; rm -r unsaved/checkpoints unsaved/summary.json"

    launch = partial(setup.launch, method="mae")
    launches = {
        "kept": launch("kept", EVERY_CYCLE),
        "killed": launch("killed", EVERY_CYCLE, KEEP_ALL, resume=True, shell=killed),
        "unsaved": launch("unsaved", resume=True, shell=unsaved),
        "same step": launch("kept", resume=True),
        "bug": launch("bug", EVERY_CYCLE, "checkpoint.keep=1", bug=(1, ("_00000006", "shards_"))),
        "stale": launch("bug", EVERY_CYCLE, "checkpoint.keep=1", stale=1, resume=True),
        "spaced": launch("spaced", EVERY_CYCLE, "checkpoint.keep=1", "checkpoint.keep_every=2"),
        "beside": launch("beside", EVERY_CYCLE, KEEP_ALL, slow=(1, 0.5)),
        "waited for": launch(
            "waited", EVERY_CYCLE, KEEP_ALL, "checkpoint.async_save=false", slow=(1, 0.2)
        ),
    }
    for stage, rank, files in FULL:
        run, options = f"full{stage}", {"stage": stage}
        full = (rank, ("step_00000006", *files))
        launches |= {
            f"full {stage}": launch(run, EVERY_CYCLE, KEEP_ALL, **options, full=full),
            f"room again {stage}": launch(run, EVERY_CYCLE, KEEP_ALL, **options, resume=True),
        }
    disk, no_disk = small_disk
    if not no_disk:
        room = f"3 * $(du -sb {setup.folder}/kept/checkpoints/step_00000008 | cut -f1) / 2"
        size = f"$(df --output=avail -B1 {disk} | tail -n 1) - {room}"
        fill = f"head -c $(({size})) /dev/zero >{disk}/filler"
        launches["really full"] = launch("small/run", EVERY_CYCLE, shell=fill)
    ranks = run_ranks(
        "tests.runs:drive", 2, setup.folder / "ranks", launches=list(launches.values())
    )
    return dict(zip(launches, zip(*ranks, strict=True), strict=True))


def codes(outcome: Any) -> list[int]:
    return [code for code, _ in outcome]


def test_the_newest_two_are_kept(outcomes: Any, setup: Setup) -> None:
    assert codes(outcomes["kept"]) == [0, 0]
    run = setup.folder / "kept"
    complete = [name for name in checkpoints(run) if not name.endswith(".tmp")]
    assert complete == ["latest", "step_00000006", "step_00000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000008"


def test_no_checkpoint_is_complete_without_the_files_of_all_ranks(
    outcomes: Any, setup: Setup
) -> None:
    """Whatever kept one from writing; the one before it stays, though only one is kept."""
    assert codes(outcomes["bug"]) == [2, 2]
    for _, stderr in outcomes["bug"]:
        assert "step_00000006 could not be written (rank 1: odd)" in stderr.splitlines()[-1]


def test_what_one_rank_cannot_read_is_not_set_aside(outcomes: Any, setup: Setup) -> None:
    assert codes(outcomes["stale"]) == [2, 2]
    for _, stderr in outcomes["stale"]:
        error = stderr.splitlines()[-1]
        assert "rank 1 on " in error and "(Stale file handle): fix" in error
    assert checkpoints(setup.folder / "bug") == ["latest", "step_00000004"]


def test_each_second_one_stays_for_good(outcomes: Any, setup: Setup) -> None:
    assert codes(outcomes["spaced"]) == [0, 0]
    assert checkpoints(setup.folder / "spaced") == ["latest", "step_00000004", "step_00000008"]


@pytest.mark.parametrize(("run", "goes_on"), [("beside", True), ("waited for", False)])
def test_training_goes_on_while_a_slow_disk_is_written(
    outcomes: Any, setup: Setup, run: str, goes_on: bool
) -> None:
    """The second cycle is over before the first one's checkpoint, and no bit is another."""
    assert codes(outcomes[run]) == [0, 0]
    log = outcomes[run][0][1]
    assert (log.index("cycle 2 ") < log.index("/step_00000002")) == goes_on
    folder = setup.folder / run.split()[0]
    assert checkpoints(folder) == ["latest"] + [f"step_{i:08d}" for i in (2, 4, 6, 8)]
    for step in ("step_00000006", "step_00000008"):
        ours, theirs = (contents(f / "checkpoints" / step) for f in (folder, setup.folder / "kept"))
        assert ours == theirs


def test_a_finished_run_is_not_saved_again(outcomes: Any, setup: Setup) -> None:
    """Resumed, it has nothing to add."""
    assert codes(outcomes["same step"]) == [0, 0]
    (_, stderr), (_, others) = outcomes["same step"]
    assert "is finished: nothing is left to do" in stderr
    assert "resumed from" not in stderr and "saved" not in stderr
    assert others == ""  # one rank's notice is enough


def test_records_after_the_checkpoint_are_dropped_with_what_they_tell_of(
    outcomes: Any, setup: Setup
) -> None:
    assert codes(outcomes["killed"]) == [0, 0]
    assert "step_00000099.tmp: its writing was cut short" in outcomes["killed"][0][1]
    killed, kept = setup.folder / "killed", setup.folder / "kept"
    assert checkpoints(killed) == ["latest", "step_00000006", "step_00000008"]
    assert metrics_rows(killed) == metrics_rows(kept)
    newest = "checkpoints/step_00000008"
    # keep and interval stand in recipe.yaml, which is not a tensor file
    assert contents(killed / newest) == contents(kept / newest)


def test_a_run_without_checkpoint_starts_again(outcomes: Any, setup: Setup) -> None:
    assert codes(outcomes["unsaved"]) == [0, 0]
    assert "starting from scratch" in outcomes["unsaved"][0][1]
    assert metrics_rows(setup.folder / "unsaved") == metrics_rows(setup.folder / "kept")


@pytest.mark.parametrize(("stage", "rank", "files"), FULL)
def test_a_full_disk_under_one_rank_stops_all_with_one_sentence(
    outcomes: Any, setup: Setup, stage: int, rank: int, files: tuple[str, ...]
) -> None:
    assert codes(outcomes[f"full {stage}"]) == [2, 2]
    for _, stderr in outcomes[f"full {stage}"]:
        assert "Traceback" not in stderr
        error = stderr.splitlines()[-1]
        assert error.startswith("error: ") and "step_00000006 could not be written" in error
        assert f"rank {rank}: " in error and "No space left on device" in error
        assert "--resume" in error


@pytest.mark.parametrize("stage", [stage for stage, _, _ in FULL])
def test_after_a_full_disk_the_run_goes_on(outcomes: Any, setup: Setup, stage: int) -> None:
    assert codes(outcomes[f"room again {stage}"]) == [0, 0]
    run, kept = setup.folder / f"full{stage}", setup.folder / "kept"
    assert checkpoints(run) == ["latest"] + [f"step_{i:08d}" for i in (2, 4, 6, 8)]
    if stage == 2:  # as `kept`
        newest = "checkpoints/step_00000008"
        assert contents(run / newest) == contents(kept / newest)


def test_a_disk_that_is_really_full(
    outcomes: Any, setup: Setup, small_disk: tuple[Path, str]
) -> None:
    """With room for one checkpoint and a half, the first one stays."""
    disk, no_disk = small_disk
    if no_disk:
        pytest.skip(f"no small disk here: {no_disk}")
    assert codes(outcomes["really full"]) == [2, 2]
    for _, stderr in outcomes["really full"]:
        assert "Traceback" not in stderr
        error = stderr.splitlines()[-1]
        assert error.startswith("error: ") and "step_00000004 could not be written" in error
    assert checkpoints(disk / "run") == ["latest", "step_00000002"]
