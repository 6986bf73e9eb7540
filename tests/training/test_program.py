"""What every training program gets: evaluation, state, results and reports, in real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.ranks import run_ranks
from tests.runs import NUM_IMAGES, Setup, checkpoints, contents, metrics_rows

STAGES = (0, 3)
NUM_CYCLES = 2 * (NUM_IMAGES // 16)


def recipe(folder: Path, beton: Path) -> str:
    values = {
        "method": "toy",
        "output_dir": str(folder / "none"),
        "epochs": 2,
        "model": {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 1, "num_heads": 2},
        "data": {"train": str(beton)},
        "mean": {"batch_size": 16, "lr": 0.05, "schedule": "linear", "warmup_epochs": 0.4},
        "checkpoint": {"keep": 1},
        "monitor": {"log_interval": 1, "eval_interval_epochs": 1, "picture_interval_epochs": 1},
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


@pytest.fixture(scope="module")
def outcomes(module_setup: Setup, beton: Path) -> list[Any]:
    """By rank: codes and stderr of all launches, and how many engines they left in memory.

    A whole and a stopped and resumed run at each stage, one that is refused, one whose evaluation
    fails after the training, and in a second launch its report, and one at stage 2.
    """
    file = recipe(module_setup.folder, beton)
    launches = []
    for stage in STAGES:

        def launch(name: str, stage: int = stage, **more: Any) -> dict[str, Any]:
            common = {"recipe": file, "program": "tests.training.toy:ToyProgram"}
            return module_setup.launch(f"{name}{stage}", stage=stage, **common, **more)

        launches += [launch("whole"), launch("halves", kill=(1, 6)), launch("halves", resume=True)]
    launches.append(
        module_setup.launch("bad", "mean.batch_size=100", recipe=file)
        | {"program": "tests.training.toy:ToyProgram"}
    )
    unlucky = module_setup.folder / "unlucky"
    final = launches[0] | {
        "overrides": [f"output_dir={unlucky}", "monitor.eval_interval_epochs=null"]
    }
    launches.append(final | {"shell": f"mkdir {unlucky}; touch {unlucky}/no_evaluation"})
    swap = f"rm {unlucky}/no_evaluation; touch {unlucky}/no_report"
    launches.append(final | {"shell": swap, "resume": True})
    launches.append(launch("finished", stage=2))
    function = "tests.training.toy:drive_and_count"
    return run_ranks(function, 2, module_setup.folder / "ranks", launches=launches)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_has_every_bit_of_a_whole_one(outcomes, module_setup, stage):
    first = 3 * STAGES.index(stage)
    assert [outcomes[0][0][first + i][0] for i in range(3)] == [0, 143, 0], outcomes[0]
    whole, halves = (module_setup.folder / f"{name}{stage}" for name in ("whole", "halves"))
    last = f"step_{NUM_CYCLES:08d}"
    assert checkpoints(whole) == checkpoints(halves) == ["latest", last]
    ours, theirs = (contents(run / "checkpoints" / last) for run in (whole, halves))
    names = [name for name in theirs if name.startswith(("own_", "shared", "model"))]
    assert {"own_00000.safetensors/seen", "own_00001.safetensors/seen"} < set(names)
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert ours["own_00000.safetensors/seen"] != ours["own_00001.safetensors/seen"]
    told = [[r for r in metrics_rows(run) if "test/count" in r] for run in (whole, halves)]
    assert told[0] == told[1]
    assert [(r["cycle"], r["test/count"]) for r in told[0]] == [(5, 5.0), (10, 10.0)]


def test_the_rate_rises_and_falls_in_a_line(outcomes, module_setup):
    rates = [r["mean/lr"] for r in metrics_rows(module_setup.folder / "whole0") if "mean/lr" in r]
    warmup, total = 2, NUM_CYCLES
    line = [(total - step) / (total - warmup) for step in range(warmup, total)]
    assert rates == pytest.approx([0.0, 0.025, *(0.05 * value for value in line)])


def test_result_report_and_picture_are_left(outcomes, module_setup):
    folder = module_setup.folder / "whole0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["protocol"], result["test/count"], result["method"]) == ("toy", 10.0, "toy")
    page = (folder / "report.md").read_text()
    last = [r["mean/loss"] for r in metrics_rows(folder) if "mean/loss" in r][-1]
    assert f"| mean/loss | {last:.6g} |" in page
    assert "| protocol | toy |" in page and "| test/loss | 0.25 |" in page
    assert "--host localhost" in page and f"({NUM_IMAGES} for mean)" in page
    assert json.loads((folder / "summary.json").read_text())["mean_steps"] == NUM_CYCLES
    with Image.open(folder / "square.png") as picture:
        assert picture.size == (4, 4)


def test_what_a_program_refuses_is_said_before_ranks_start(outcomes, module_setup):
    code, stderr = outcomes[0][0][6]
    assert code == 2 and "error: mean.batch_size is too large: lower it" in stderr
    assert not (module_setup.folder / "bad").exists()


def test_what_fails_after_the_training_costs_only_itself(outcomes, module_setup):
    (first, _), (second, stderr) = outcomes[0][0][7:9]
    assert (first, second) == (2, 2) and "resumed from" in stderr
    folder = module_setup.folder / "unlucky"
    whole = contents(module_setup.folder / "whole0/checkpoints" / f"step_{NUM_CYCLES:08d}")
    found = contents(folder / "checkpoints" / f"step_{NUM_CYCLES:08d}")
    for name in ("shared.safetensors/num_counted", "own_00001.safetensors/seen"):
        assert found[name] == whole[name]
    # summary.json says that a run is over, so it is not there before the report
    assert (folder / "result.json").is_file() and not (folder / "summary.json").exists()


def test_a_finished_run_leaves_no_engine_in_memory(outcomes):
    assert [(codes[9][0], count) for codes, count in outcomes] == [(0, 0), (0, 0)]


def test_a_recipe_of_another_kind_is_refused(module_setup, beton):
    from mlomae.errors import UserError
    from mlomae.pretraining.recipe import PretrainingRecipe
    from mlomae.training.program import make_job

    with pytest.raises(UserError, match="method is toy, but must be mlo_mae or mae here"):
        make_job(PretrainingRecipe, recipe(module_setup.folder, beton), module_setup.config())


@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:41001",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_lost_another_asks_to_be_launched_again(monkeypatch, capfd, said):
    from mlomae.training.command_line import exit_code

    def work() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("mlomae.distributed.start.LAUNCHER_GRACE", 0)
    assert exit_code(work) == 75
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: rank 0 has lost another rank") and "--resume" in error


def test_other_errors_keep_their_traceback():
    from mlomae.training.command_line import exit_code

    def work() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code(work)
