"""Checkpoints that lost files or bits: the newest sound one is used, and the run ends the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import NUM_CYCLES, Runs, step_name


def cut(file: Path) -> None:
    """Only the first half is left."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """The lowest bit of the last byte is another."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


Damage = tuple[int, Callable[[Path], None], str]  # checkpoints before the newest, what, file

CASES: dict[str, list[Damage]] = {
    "missing shard": [(0, Path.unlink, "pretrain/shards_00001.safetensors")],
    "truncated weights": [(0, cut, "model.safetensors")],
    "flipped bit": [(0, flip, "mask/shards_00000.safetensors")],
    "flipped bit in a random state": [(0, flip, "random_00001.safetensors")],
    "truncated state": [(0, cut, "state.json")],
    "missing state": [(0, Path.unlink, "state.json")],
    "two damaged": [
        (0, Path.unlink, "classifier/shards_00000.safetensors"),
        (1, cut, "pretrain/shards_00000.safetensors"),
    ],
}


def make_damaged(runs: Runs, run: str, damages: list[Damage]) -> Path:
    """A run that was killed after its last save, and whose files came to harm."""
    whole = runs.undisturbed(2)
    shutil.copytree(whole, runs.folder / run, ignore=shutil.ignore_patterns("summary.json"))
    for number, damage, file in damages:
        damage(runs.folder / run / "checkpoints" / step_name(NUM_CYCLES - number) / file)
    return runs.folder / run / "checkpoints"


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint_is_skipped_with_a_notice(runs: Runs, case: str) -> None:
    damages = CASES[case]
    checkpoints = make_damaged(runs, case, damages)
    output = runs.finish(case)
    for number, _, file in damages:
        name = step_name(NUM_CYCLES - number)
        assert f"skipped {checkpoints / name}: damaged ({file}: " in output
        assert (checkpoints / f"{name}.damaged").is_dir()
    assert f"resumed from {checkpoints / step_name(NUM_CYCLES - len(damages))}" in output
    runs.assert_equal(case)


def test_without_a_sound_checkpoint_nothing_is_overwritten(runs: Runs) -> None:
    """One is put back from elsewhere, as the sentence asks; then the run goes on."""
    run, file = "all damaged", "mask/shards_00001.safetensors"
    checkpoints = make_damaged(runs, run, [(number, flip, file) for number in range(3)])
    names = sorted(path.name for path in checkpoints.iterdir())
    with runs.launch(run, resume=True) as launch:
        assert launch.finish()[0] == 2, launch.output
        assert f"no checkpoint in {checkpoints} can be read" in launch.error(0)
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    flip(checkpoints / step_name(NUM_CYCLES - 1) / file)  # back to what it was
    runs.finish(run)
    runs.assert_equal(run)
