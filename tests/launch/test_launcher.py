"""What a user types: `deepspeed launch/pretrain.py ...`, Ctrl-C, and `--resume`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_ffcv.convert import convert
from mlomae.pretraining.networks import load_masking_network, load_model
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from tests.ranks import free_port
from tests.runs import Setup, checkpoints, metrics_rows, tree

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 2
LEVELS = ("pretrain", "classifier", "mask")
FREQUENCY = "masking/frequency"


class Command:
    """A launch in a process group of its own, as a terminal starts it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, timeout: float = 90) -> int:
        """Wait for every process of the group; DeepSpeed's outermost one ends first."""
        code = self.process.wait(timeout)
        self.wait_until(lambda: not self._alive(), timeout)
        return code

    def wait_until(self, condition: Callable[[], bool], timeout: float = 90) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"timed out\n{self.output}"
            time.sleep(0.05)

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        if self._alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def _alive(self) -> bool:
        return any(map(self._is_member, psutil.process_iter()))

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            in_group = os.getpgid(process.pid) == self.process.pid
            return in_group and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


@contextmanager
def deepspeed(setup: Setup, *arguments: str) -> Iterator[Command]:
    """`deepspeed --num_gpus 2 launch/pretrain.py` on CPU, killed at the end if need be."""
    port = free_port()
    log = setup.folder / f"log{len(list(setup.folder.glob('log*')))}.txt"
    launcher = ["--num_gpus", str(NUM_RANKS), "--master_port", str(port)]
    config = str(ROOT / "ds_configs" / "cpu_zero2_fp32.json")
    script = ["launch/pretrain.py", "--recipe", setup.recipe, "--deepspeed_config", config]
    strangers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in strangers}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("deepspeed")), *launcher, *script, *arguments],
            cwd=ROOT,
            env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    command = Command(process, log)
    try:
        yield command
    finally:
        command.kill()


OVERRIDES = ("epochs=12", "monitor.picture_interval_epochs=4")  # 24 cycles


@pytest.fixture(scope="module")
def interrupted(module_setup: Setup) -> tuple[Path, str, list[str]]:
    """A run that was interrupted after two cycles: its folder, output and checkpoints."""
    run = module_setup.folder / "run"
    metrics = run / "metrics.jsonl"
    with deepspeed(module_setup, *OVERRIDES, f"output_dir={run}") as command:
        command.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
        command.interrupt()
        assert command.wait() != 0
        return run, command.output, checkpoints(run)


@pytest.fixture(scope="module")
def finished(module_setup: Setup, interrupted: tuple[Path, str, list[str]]) -> tuple[Path, str]:
    """The same run, resumed and finished: its folder and output."""
    run = interrupted[0]
    with deepspeed(module_setup, *OVERRIDES, f"output_dir={run}", "--resume") as command:
        assert command.wait() == 0, command.output
        return run, command.output


def test_ctrl_c_finishes_the_cycle_and_saves(interrupted: tuple[Path, str, list[str]]) -> None:
    run, output, found = interrupted
    assert "saving after this cycle" in output
    latest, step = found
    assert latest == "latest" and 2 * 2 <= int(step.removeprefix("step_")) < 2 * 24
    assert f"saved {run}/checkpoints/{step}" in output and "after saving" in output


def test_resume_finishes_what_was_interrupted(
    interrupted: tuple[Path, str, list[str]], finished: tuple[Path, str]
) -> None:
    run, output = finished
    assert f"resumed from {run}/checkpoints/{interrupted[2][1]}" in output
    assert [record["cycle"] for record in metrics_rows(run)] == list(range(1, 25))
    assert "Traceback" not in output


def test_the_resolved_recipe_is_printed_and_saved(
    finished: tuple[Path, str], module_setup: Setup
) -> None:
    run, output = finished
    asked = load_recipe(module_setup.recipe, PretrainingRecipe, [*OVERRIDES, f"output_dir={run}"])
    assert load_recipe(run / "recipe.yaml", PretrainingRecipe) == asked
    assert (run / "recipe.yaml").read_text() in output
    assert json.loads((run / "deepspeed_config.json").read_text())["zero_optimization"]


def test_records_hold_what_is_promised(finished: tuple[Path, str]) -> None:
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    promised = {
        *("cycle", "epoch", "seconds", "images_per_second"),
        *(f"{level}/{value}" for level in LEVELS for value in ("loss", "lr", "step")),
        *("pretrain/grad_norm", "classifier/grad_norm", "mask/hypergradient_norm"),
        *(f"time/{phase}" for phase in ("data", "pretrain_step", "classifier_step", "mask_step")),
        *("masking/score_mean", "masking/score_entropy", "masking/frequency"),
    }
    for record in map(json.loads, lines):
        assert promised <= record.keys()
        assert all(isinstance(record[key], int | float) for key in promised - {FREQUENCY})
        assert len(record[FREQUENCY]) == 16  # patches
        # 75 % of the patches are hidden, whichever they are
        assert sum(record[FREQUENCY]) / 16 == pytest.approx(0.75)
        assert 0 < record["masking/score_mean"] < 1
        assert record["mask/hypergradient_norm"] > 0
    assert json.loads(lines[-1])["pretrain/step"] == 48


def test_tensorboard_shows_the_same_numbers(finished: tuple[Path, str]) -> None:
    board = EventAccumulator(str(finished[0]))
    board.Reload()
    shown = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    for record in metrics_rows(finished[0]):
        for key, value in record.items():
            if key not in ("cycle", FREQUENCY):
                assert shown[key][record["cycle"]] == pytest.approx(value, rel=1e-6), key
    assert {"masks", FREQUENCY} <= set(board.Tags()["images"])
    # every 4 epochs of 2 cycles
    assert [e.step for e in board.Images("masks")] == [8, 16, 24]


def test_pictures_and_summary(finished: tuple[Path, str]) -> None:
    run, _ = finished
    with Image.open(run / "masks.png") as picture:
        assert (picture.mode == "RGB" and picture.width == 2 * picture.height - 4) or picture.size
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["pretrain_steps"], summary["world_size"]) == (48, NUM_RANKS)
    rate = 48 * 16 / summary["seconds"]
    assert summary["images_per_second"] == pytest.approx(rate)


def test_a_checkpoint_is_laid_out_as_documented(finished: tuple[Path, str]) -> None:
    newest = finished[0] / "checkpoints" / "step_00000048"
    assert (newest.parent / "latest").read_text() == newest.name
    assert {path.name for path in newest.iterdir()} == {
        *("state.json", "recipe.yaml", "model.safetensors", "masking.safetensors"),
        *("random_00000.safetensors", "random_00001.safetensors", *LEVELS),
    }
    model, recipe = load_model(finished[0])
    assert recipe == load_recipe(finished[0] / "recipe.yaml", PretrainingRecipe)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert load_masking_network(newest) is not None


def test_a_second_launch_leaves_the_first_alone(
    finished: tuple[Path, str], module_setup: Setup
) -> None:
    run = finished[0]
    before = tree(run)
    with deepspeed(module_setup, f"output_dir={run}") as command:
        assert command.wait() == 2
        errors = re.findall("^error: .*", command.output, re.MULTILINE)
    assert len(errors) == 1 and str(run) in errors[0] and "--resume" in errors[0]
    assert "Traceback" not in command.output
    assert tree(run) == before


def test_a_corrupt_image_under_one_rank_is_named(setup: Setup, png_folder: Path) -> None:
    """One rank's loading thread fails; the other ranks end, and the reason is told."""
    path = setup.folder / "jpg.beton"
    convert("imagefolder", png_folder, path, write_mode="jpg")
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff", len(content) // 2)
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    with deepspeed(setup, f"data.train={path}") as command:
        assert command.wait() != 0
        errors = re.findall("^error: .*", command.output, re.MULTILINE)
    # On a busy machine the others may speak before the launcher has ended them.
    errors = [error for error in errors if "has lost another rank" not in error]
    assert errors, command.output
    for error in errors:
        assert re.search(rf"{path}: the JPEG data of sample \d+ is corrupt", error)
