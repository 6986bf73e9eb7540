"""From images to a learned mask and a report, in minutes: what `launch/quickstart.sh` runs.

    python -m mlomae quickstart --output runs/quickstart [--data DIR]

The stages are commands that a user could start by hand; the report repeats them. MLO-MAE trains in
the output folder itself, plain MAE in `mae/` within it. Started again after an interruption, the
quickstart keeps the finished stages and resumes the one that was interrupted.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_ffcv import Augmentation, BetonInfo, DataError, open_eval_loader, split_by_class
from mlomae.commands.quickstart.data import (
    convert_images,
    epochs_of,
    find_source,
    mae_overrides,
    user_data_overrides,
)
from mlomae.commands.quickstart.report import Facts, RunSummary, render_report
from mlomae.commands.quickstart.training import (
    ROOT,
    Launch,
    StageFailed,
    plan_launch,
    train,
    training_command,
)
from mlomae.environment import describe_machine
from mlomae.errors import UserError
from mlomae.pretraining.networks import load_masking_network, load_model
from mlomae.pretraining.pictures import mask_picture
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training.monitor import save_picture
from mlomae.training.result import REPORT_FILE

# k-NN and cached probe learn from these; encoding all 60 000 would take as long as training
NUM_EVAL_TRAIN_IMAGES = 10_000


@dataclass
class Quickstart:
    """One quickstart: where it writes, and what it has done so far."""

    output: Path
    console: Console
    start: float = field(default_factory=time.perf_counter)
    commands: list[list[str]] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announce a stage, and say afterwards how long it took."""
        self.console.print(title, style="bold", highlight=False)
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self.stage_seconds[title] = now - start
        line = f"  done in {now - start:.0f} s, {now - self.start:.0f} s in all"
        self.console.print(line, highlight=False)

    def train(self, name: str, run: Path, launch: Launch, overrides: list[str]) -> RunSummary:
        """Train with the quickstart recipe of this name."""
        command = training_command(name, run, launch, overrides)
        variables = [f"{key}={value}" for key, value in launch.environment.items()]
        self.commands.append([*variables, *command])
        return train(command, run, self.output / "logs" / f"{name}.log", launch, self.console)


def claim(output: Path, data: Path | None) -> None:
    """Mark an output folder as this quickstart's, or see that it is already.

    Raises:
        UserError: The folder holds something else or a finished quickstart, or is unwritable.
    """
    images = str(data.resolve()) if data else "fashion-mnist"
    marker = output / "quickstart.json"
    fix = "delete it, or choose another folder with --output"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / REPORT_FILE).exists():
            raise UserError(f"{output} holds a finished quickstart: {fix}")
        if marker.exists():
            if json.loads(marker.read_text())["images"] != images:
                raise UserError(f"{output} holds a quickstart on other images: {fix}")
        elif any(output.iterdir()):
            raise UserError(f"{output} holds other files: {fix}")
        else:
            marker.write_text(json.dumps({"images": images}) + "\n")
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}): choose another folder with --output"
        ) from None


def run_all(output: Path, data: Path | None, console: Console) -> None:
    """Run every stage and write the report.

    Raises:
        DataError, UserError: Bad input.
        StageFailed: A command failed.
    """
    quickstart = Quickstart(output, console)
    source = find_source(data)
    claim(output, data)
    with quickstart.stage(f"Converting the images of {source.train}"):
        images, test = convert_images(source, output / "data", console)

    overrides = [f"data.train={images.path}"]
    if data is not None:
        overrides += user_data_overrides(
            load_recipe("quickstart_mlo_mae", PretrainingRecipe), images
        )
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, overrides)
    batch_size = recipe.pretrain.batch_size
    launch = plan_launch(batch_size)
    with quickstart.stage(f"Training MLO-MAE in {launch.num_processes} processes"):
        mlo_mae = quickstart.train("mlo_mae", output, launch, overrides)
    with quickstart.stage("Training plain MAE with as many encoder steps"):
        epochs = epochs_of(mlo_mae.pretrain_steps, images.num_samples, batch_size)
        mae = quickstart.train("mae", output / "mae", launch, mae_overrides(overrides, epochs))
    with quickstart.stage("Evaluating both encoders and an untrained one"):
        results = evaluate(quickstart, images, test)
        draw_masks(output, test)

    assert images.labels is not None  # as in all that the quickstart converts
    rest, _ = split_by_class(images.labels, recipe.data.mask_fraction, recipe.seed)
    facts = Facts(
        output=output,
        source=source.train,
        num_images=images.num_samples,
        num_encoder_images=len(rest),
        runs={"mlo_mae": mlo_mae, "mae": mae},
        results=results,
        commands=quickstart.commands,
        stage_seconds=quickstart.stage_seconds,
        machine=describe_machine(ROOT),
    )
    (output / REPORT_FILE).write_text(render_report(facts), encoding="utf-8")


def evaluate(quickstart: Quickstart, train: BetonInfo, test: BetonInfo) -> list[dict[str, Any]]:
    """Rows of `eval.compare` for MLO-MAE, MAE and the untrained encoder.

    A command like the training: this package does not import `eval`.
    """
    file = quickstart.output / "compare.json"
    command = [
        *(sys.executable, "-m", "eval.compare"),
        *("--train", str(train.path), "--test", str(test.path)),
        *("--num_train_images", str(NUM_EVAL_TRAIN_IMAGES)),
        *("--output", str(file)),
        *(str(quickstart.output), str(quickstart.output / "mae")),
    ]
    quickstart.commands.append(command)
    exit_code = subprocess.run(command, cwd=ROOT).returncode
    if exit_code:
        raise StageFailed("error: the evaluation failed for the reason above", exit_code)
    encoders: list[dict[str, Any]] = json.loads(file.read_text())["encoders"]
    return encoders


def draw_masks(output: Path, test: BetonInfo) -> None:
    """Draw the learned masks on the first test images, in place of the training's picture."""
    model, recipe = load_model(output)
    masking_network = load_masking_network(output)
    size, data = recipe.model.image_size, recipe.data
    loader = open_eval_loader(
        test.path,
        augmentation=Augmentation(kind="center_crop", image_size=size, resize=size),
        indices=np.arange(min(recipe.monitor.num_pictures, test.num_samples)),
        batch_size=recipe.monitor.num_pictures,
        mean=data.mean,
        std=data.std,
    )
    with torch.no_grad():
        images, _ = next(iter(loader))
        picture = mask_picture(model, images, model(images, masking_network), data.mean, data.std)
    save_picture(picture, str(output / "masks.png"))


def main(output: Path, data: Path | None) -> int:
    """Run all stages, say where the results are, and return the exit code."""
    output = output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so no process stays behind
    console = Console()
    try:
        run_all(output, data and data.resolve(), console)
    except (UserError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except StageFailed as failure:
        sys.stderr.write(f"{failure}\n")
        return failure.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command continues from here\n")
        return 130
    for line in (
        f"report       {output / 'report.md'}",
        f"masks        {output / 'masks.png'}",
        f"metrics      {output / 'metrics.jsonl'}",
        f"TensorBoard  tensorboard --logdir {shlex.quote(str(output))} --host localhost",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0
