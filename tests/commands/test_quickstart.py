import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from data_ffcv.beton.info import BetonInfo, Samples
from mlomae.commands.quickstart import data as _quickstart_data
from mlomae.commands.quickstart import training as _quickstart_training
from mlomae.commands.quickstart.command import claim
from mlomae.commands.quickstart.data import (
    USER_NUM_STEPS,
    epochs_of,
    find_source,
    mae_overrides,
    user_data_overrides,
)
from mlomae.commands.quickstart.report import Facts, RunSummary, render_report
from mlomae.commands.quickstart.training import StageFailed, plan_launch, run_logged, train
from mlomae.environment import describe_machine
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training.task import count_cycles

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
SUMMARY = {"seconds": 80.4, "pretrain_steps": 750, "images_per_second": 2388.1, "world_size": 2}


def beton_info(num_images: int, num_classes: int = 5) -> BetonInfo:
    labels = np.arange(num_images) % num_classes
    names = tuple(map(str, range(num_classes)))
    places = Samples(*[np.zeros(num_images, np.int64)] * 5, mask_pointers=None)
    return BetonInfo(
        Path("x.beton"), num_images, num_classes, names, labels, places, 80, 90, 80, 90
    )


# --- the images --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "val"])
def test_finds_the_folders_of_the_user(tmp_path, name):
    (tmp_path / "train").mkdir()
    (tmp_path / name).mkdir()
    source = find_source(tmp_path)
    assert (source.format, source.train, source.test) == (
        "imagefolder",
        tmp_path / "train",
        tmp_path / name,
    )


@pytest.mark.parametrize("present", [[], ["train"], ["test"], ["cat", "dog"]])
def test_names_the_missing_folders(tmp_path, present):
    for name in present:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"--data {tmp_path} needs two folders"):
        find_source(tmp_path)


def test_a_failed_download_names_the_ways_out(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    def download(self: FashionMNIST) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(_quickstart_data, "_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.setattr(_quickstart_data, "_DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(FashionMNIST, "download", download)
    with pytest.raises(UserError, match=r"no route to host.*dataset-fashion-mnist.*--data"):
        find_source(None)


# --- equal steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 7, 374, 748, 749, 750])
@pytest.mark.parametrize(("num_images", "batch_size"), [(60_000, 256), (48_001, 200), (1000, 64)])
def test_plain_mae_takes_exactly_the_steps_of_mlo_mae(num_steps, num_images, batch_size):
    epochs = epochs_of(num_steps, num_images, batch_size)
    overrides = mae_overrides([f"pretrain.batch_size={batch_size}", "epochs=4"], epochs)
    assert (
        count_cycles(load_recipe("quickstart_mae", PretrainingRecipe, overrides), num_images)
        == num_steps
    )


@pytest.mark.parametrize(("num_images", "batch_size"), [(60_000, 128), (700, 128), (50, 8)])
def test_own_images_get_a_valid_recipe_with_as_many_steps(num_images, batch_size):
    images = beton_info(num_images)
    overrides = user_data_overrides(load_recipe("quickstart_mlo_mae", PretrainingRecipe), images)
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, overrides)
    upper = min(64, batch_size)
    sizes = {name: level.batch_size for name, level in recipe.levels.items()}
    assert sizes == {"pretrain": batch_size, "classifier": upper, "mask": upper}
    assert (recipe.data.num_classes, recipe.model.num_patches) == (5, 16)
    steps_per_epoch = round(num_images * 0.8) // batch_size
    assert recipe.epochs * steps_per_epoch == pytest.approx(USER_NUM_STEPS)

    epochs = epochs_of(USER_NUM_STEPS, num_images, batch_size)
    mae = load_recipe("quickstart_mae", PretrainingRecipe, mae_overrides(overrides, epochs))
    assert mae.epochs * (num_images // batch_size) == pytest.approx(USER_NUM_STEPS)
    assert (mae.model, mae.pretrain.batch_size) == (recipe.model, batch_size)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match=r"--data has 30 training images.*add images"):
        user_data_overrides(load_recipe("quickstart_mlo_mae", PretrainingRecipe), beton_info(30))


def test_the_two_recipes_differ_in_the_masks_alone():
    mlo_mae, mae = (
        load_recipe("quickstart_mlo_mae", PretrainingRecipe),
        load_recipe("quickstart_mae", PretrainingRecipe),
    )
    assert mae.model == mlo_mae.model
    assert mae.masking.mask_ratio == mlo_mae.masking.mask_ratio
    assert mae.data.augmentation == mlo_mae.data.augmentation
    assert (mae.data.mean, mae.data.std) == (mlo_mae.data.mean, mlo_mae.data.std)
    pretrain = mlo_mae.pretrain.model_copy(update={"steps_per_cycle": 1})
    assert mae.pretrain.model_copy(update={"steps_per_cycle": 1}) == pretrain
    assert pretrain.warmup_epochs == 0  # epochs differ in length, so a warm-up would as well


# --- the output folder -------------------------------------------------------------------------


def test_an_interrupted_quickstart_is_taken_up_and_a_finished_one_is_not(tmp_path):
    output = tmp_path / "new" / "quickstart"
    claim(output, None)
    claim(output, None)
    with pytest.raises(UserError, match="other images"):
        claim(output, tmp_path)
    (output / "report.md").write_text("done")
    with pytest.raises(UserError, match=rf"{output} holds a finished quickstart.*--output"):
        claim(output, None)
    assert (output / "report.md").read_text() == "done"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        claim(tmp_path, None)
    with pytest.raises(UserError, match=r"cannot be written.*--output"):
        claim(tmp_path / "thesis.tex", None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_data_exits_with_two_and_leaves_nothing(tmp_path):
    command = ["-m", "mlomae", "quickstart", "--data", "nowhere", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the training processes --------------------------------------------------------------------


def test_two_processes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch = plan_launch(256)
    assert launch.num_processes == 2
    assert launch.environment["DS_ACCELERATOR"] == "cpu"
    assert (ROOT / launch.deepspeed_config).is_file()


@pytest.mark.parametrize(("num_gpus", "used"), [(1, 1), (2, 2), (6, 4), (8, 8)])
def test_as_many_gpus_as_divide_the_batch(monkeypatch, num_gpus, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    launch = plan_launch(256)
    assert launch.num_processes == used
    assert "bf16" in launch.deepspeed_config and (ROOT / launch.deepspeed_config).is_file()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_train(tmp_path: Path, command: list[str]) -> RunSummary:
    return train(command, tmp_path, tmp_path / "logs" / "x.log", plan_launch(256), QUIET)


def test_a_finished_training_is_read_and_kept(tmp_path):
    code = f"open({str(tmp_path / 'summary.json')!r}, 'x').write({json.dumps(SUMMARY)!r})"
    first = run_train(tmp_path, python(code))
    assert first == RunSummary(**SUMMARY)
    assert run_train(tmp_path, python("raise SystemExit(1)")) == first


def test_an_interrupted_training_is_resumed_even_before_its_first_checkpoint(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(StageFailed, match=r"\['--resume'\]"):
        run_train(tmp_path, python("import sys; print(sys.argv[1:])"))


@pytest.mark.parametrize(("exit_code", "reported"), [(2, 2), (0, 1)])
def test_a_failed_training_shows_the_end_of_its_log(tmp_path, exit_code, reported):
    with pytest.raises(StageFailed) as failure:
        run_train(tmp_path, python(f"print('error: no space left'); raise SystemExit({exit_code})"))
    assert failure.value.exit_code == reported
    assert "error: no space left\nerror: a training failed" in str(failure.value)
    assert str(tmp_path / "logs" / "x.log") in str(failure.value)


def test_an_interruption_lets_every_process_save_and_go(tmp_path, monkeypatch):
    """A launcher dies of the signal at once, as DeepSpeed's does; its rank takes its time."""
    rank = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    launcher = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])")

    def interrupt_once_running(metrics: Path) -> str:
        pid_file = tmp_path / "pid"
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        return "starting"

    monkeypatch.setattr(_quickstart_training, "_describe_progress", interrupt_once_running)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_logged(launcher, {}, tmp_path / "log", tmp_path / "metrics.jsonl", QUIET)
    assert time.monotonic() - start < 30
    assert (tmp_path / "saved").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIG_DFL)


def test_progress_is_the_latest_record(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    describe = _quickstart_training._describe_progress
    assert describe(metrics) == "starting"
    record = {"pretrain/step": 20, "pretrain/loss": 0.91234, "images_per_second": 2400.4}
    metrics.write_text('{"pretrain/step": 10}\n' + json.dumps(record) + "\n")
    assert describe(metrics) == "step 20, loss 0.9123, 2400 images/s"
    metrics.write_text(metrics.read_text() + '{"pretrain/st')
    assert describe(metrics) == "starting"


# --- the report --------------------------------------------------------------------------------


def facts(mlo_mae: tuple[float, float], mae: tuple[float, float], mae_steps: int = 750) -> Facts:
    accuracies = {"mlo_mae": mlo_mae, "mae": mae, "untrained": (0.55, 0.6)}
    counts = {"num_train_images": 20_000, "num_test_images": 10_000, "num_classes": 10}
    return Facts(
        output=Path("/tmp/my runs/quickstart"),
        source=Path("/usr/share/datasets/fashion-mnist"),
        num_images=60_000,
        num_encoder_images=48_000,
        runs={
            "mlo_mae": RunSummary(**SUMMARY),
            "mae": RunSummary(40.0, mae_steps, 4801.0, 2),
        },
        results=[
            {
                "encoder": name,
                **counts,
                "knn": {"accuracy": knn},
                "cached_probe": {"accuracy": probe},
            }
            for name, (knn, probe) in accuracies.items()
        ],
        commands=[["deepspeed", "--num_gpus", "2", "data.mean=[0.5, 0.5, 0.5]"]],
        stage_seconds={"Converting": 11.6},
        machine=["2 CPU cores, no GPU"],
    )


def test_the_table_holds_the_numbers():
    report = render_report(facts(mlo_mae=(0.7512, 0.8), mae=(0.74, 0.8101)))
    assert "| MLO-MAE (learned masks) | 75.1 % | 80.0 % | 750 | 80 s | 2388 |" in report
    assert "| MAE (random masks) | 74.0 % | 81.0 % | 750 | 40 s | 4801 |" in report
    assert "| untrained | 55.0 % | 60.0 % | 0 |" in report
    assert "k-NN: MLO-MAE is 1.1 points above MAE" in report
    assert "cached probe: MLO-MAE is 1.0 points below MAE" in report
    assert "10000 test images" in report and "20000 labelled training images" in report
    assert "equally many steps" in report and "48000 of the 60000" in report
    assert "used the labels" in report and "one seed" in report


def test_unequal_steps_and_equal_results_are_said():
    report = render_report(facts(mlo_mae=(0.75, 0.8), mae=(0.75, 0.8), mae_steps=748))
    assert "not exactly as many steps" in report
    assert report.count("MLO-MAE is level with MAE") == 2


def test_commands_in_the_report_can_be_pasted():
    report = render_report(facts((0.7, 0.8), (0.7, 0.8)))
    assert "deepspeed --num_gpus 2 'data.mean=[0.5, 0.5, 0.5]'" in report
    assert "tensorboard --logdir '/tmp/my runs/quickstart' --host localhost" in report
    assert "- Converting: 12 s" in report and "- 2 CPU cores, no GPU" in report


def test_the_machine_is_described_without_a_repository(tmp_path):
    hardware, versions = describe_machine(tmp_path)
    assert f"torch {torch.__version__}" in versions
    assert "CPU cores" in hardware or "NVIDIA" in hardware
