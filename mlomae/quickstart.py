"""From images to a learned mask and a report, in minutes: what `launch/quickstart.sh` runs.

    python -m mlomae.quickstart --output runs/quickstart [--data DIR]

The stages are commands that a user could start by hand; the report repeats them. MLO-MAE trains in
the output folder itself, plain MAE in `mae/` within it. Started again after an interruption, the
quickstart keeps the finished stages and resumes the one that was interrupted.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from data_ffcv import BetonInfo, DataError, split_by_class
from mlomae._quickstart_data import (
    convert_images,
    epochs_of,
    find_source,
    mae_overrides,
    num_cores,
    own_data_overrides,
)
from mlomae._quickstart_report import Facts, RunSummary, describe_machine, render_report
from mlomae.errors import UserError
from mlomae.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
# k-NN and linear probe learn from these; encoding all 60 000 would take as long as training
NUM_EVAL_TRAIN_IMAGES = 20_000
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 60  # what an interrupted training gets to write its checkpoint


class StageFailed(Exception):
    """A command of the quickstart failed: what to tell the user, and its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Launch:
    """How the training processes are started."""

    num_processes: int
    deepspeed_config: str
    environment: dict[str, str]


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


def claim(output: Path, data: Path | None) -> None:
    """Make an output folder this quickstart's own, or find that it was already.

    Raises:
        UserError: The folder holds something else or a finished quickstart, or is unwritable.
    """
    images = str(data.resolve()) if data else "fashion-mnist"
    marker = output / "quickstart.json"
    mend = "delete it, or choose another folder with --output"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / "report.md").exists():
            raise UserError(f"{output} holds a finished quickstart: {mend}")
        if marker.exists():
            if json.loads(marker.read_text())["images"] != images:
                raise UserError(f"{output} holds a quickstart on other images: {mend}")
        elif any(output.iterdir()):
            raise UserError(f"{output} holds other files: {mend}")
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
        overrides += own_data_overrides(load_recipe("quickstart_mlo_mae"), images)
    recipe = load_recipe("quickstart_mlo_mae", overrides)
    batch_size = recipe.pretrain.batch_size
    launch = plan_launch(batch_size)
    with quickstart.stage(f"Training MLO-MAE in {launch.num_processes} processes"):
        mlo_mae = train(quickstart, "mlo_mae", output, launch, overrides)
    with quickstart.stage("Training plain MAE with as many encoder steps"):
        epochs = epochs_of(mlo_mae.pretrain_steps, images.num_samples, batch_size)
        mae = train(quickstart, "mae", output / "mae", launch, mae_overrides(overrides, epochs))
    with quickstart.stage("Evaluating both encoders and an untrained one"):
        results = evaluate(quickstart, images, test)

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
    (output / "report.md").write_text(render_report(facts), encoding="utf-8")


def plan_launch(batch_size: int) -> Launch:
    """As many GPUs as divide the batch and bf16, or two processes on the CPU."""
    if torch.cuda.is_available():
        counts = range(1, torch.cuda.device_count() + 1)
        num_processes = max(count for count in counts if batch_size % count == 0)
        return Launch(num_processes, "ds_configs/zero2_bf16.json", {})
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, num_cores() // 2))}
    return Launch(2, "ds_configs/cpu_zero2_fp32.json", environment)


def train(
    quickstart: Quickstart, name: str, run: Path, launch: Launch, overrides: Sequence[str]
) -> RunSummary:
    """Train with a quickstart recipe, resume it, or keep what is finished.

    Raises:
        StageFailed: The training command failed.
    """
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_gpus", str(launch.num_processes)),
        *("--master_port", str(_free_port())),
        *("launch/pretrain.py", "--recipe", f"launch/recipes/quickstart_{name}.yaml"),
        *("--deepspeed_config", launch.deepspeed_config),
        f"output_dir={run}",
        *overrides,
    ]
    quickstart.commands.append(command)
    summary = run / "summary.json"
    if not summary.exists():
        resume = ["--resume"] if any(run.glob("checkpoints/step_*")) else []
        log = quickstart.output / "logs" / f"{name}.log"
        exit_code = _run_logged(
            [*command, *resume], launch.environment, log, run / "metrics.jsonl", quickstart.console
        )
        # the launcher exits with 0 when its processes were killed, so the summary decides
        if not summary.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StageFailed(
                f"{tail}\nerror: training {name} failed for the reason above: its output is in {log}",
                exit_code or 1,
            )
    values = json.loads(summary.read_text())
    return RunSummary(**{name: values[name] for name in RunSummary.__dataclass_fields__})


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _run_logged(
    command: list[str], environment: dict[str, str], log: Path, metrics: Path, console: Console
) -> int:
    """Run a training command, its output in a log, its latest metrics on the screen."""
    log.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("  {task.description}"), TimeElapsedColumn())
    with log.open("a") as file, Progress(*columns, console=console) as progress:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through `_stop` alone, and only once
        )
        task = progress.add_task("starting", total=None)
        try:
            while process.poll() is None:
                progress.update(task, description=_describe_progress(metrics))
                time.sleep(_POLL_SECONDS)
        finally:
            _stop(process)
        return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let every process of a training save and go; the launcher itself does not wait for them."""
    deadline = time.monotonic() + _SAVE_SECONDS
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # a finished launcher would otherwise stay in the group
            os.killpg(process.pid, 0)
            time.sleep(_POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all are gone
    process.wait()


def _describe_progress(metrics: Path) -> str:
    """The latest record of a run, in a line."""
    try:
        record = json.loads(metrics.read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return "starting"  # no record yet, or one half written
    return (
        f"step {record['pretrain/step']}, loss {record['pretrain/loss']:.4f}, "
        f"{record['images_per_second']:.0f} images/s"
    )


def evaluate(quickstart: Quickstart, train: BetonInfo, test: BetonInfo) -> list[dict[str, Any]]:
    """Rows of `eval.compare` for MLO-MAE, MAE and the untrained encoder.

    A command like the training: this room knows nothing of `eval`.
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
    return json.loads(file.read_text())["encoders"]


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae.quickstart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train/ and test/")
    args = parser.parse_args()
    output = args.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so no process stays behind
    console = Console()
    try:
        run_all(output, args.data and args.data.resolve(), console)
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
        f"TensorBoard  tensorboard --logdir {output} --host localhost",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
