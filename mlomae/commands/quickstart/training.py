"""The quickstart's training runs: `deepspeed` as a user would start it, watched and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from mlomae.commands.quickstart.data import num_cores
from mlomae.commands.quickstart.report import RunSummary
from mlomae.training.monitor import METRICS_FILE
from mlomae.training.report import SUMMARY_FILE

ROOT = Path(__file__).resolve().parents[3]
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


def plan_launch(batch_size: int) -> Launch:
    """As many GPUs as divide the batch and bf16, or two processes on the CPU."""
    if torch.cuda.is_available():
        counts = range(1, torch.cuda.device_count() + 1)
        num_processes = max(count for count in counts if batch_size % count == 0)
        return Launch(num_processes, "ds_configs/zero2_bf16.json", {})
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, num_cores() // 2))}
    return Launch(2, "ds_configs/cpu_zero2_fp32.json", environment)


def training_command(name: str, run: Path, launch: Launch, overrides: Sequence[str]) -> list[str]:
    """The command which trains with a quickstart recipe, run from the clone."""
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_gpus", str(launch.num_processes)),
        *("--master_port", str(_free_port())),
        *("launch/pretrain.py", "--recipe", f"launch/recipes/quickstart_{name}.yaml"),
        *("--deepspeed_config", launch.deepspeed_config),
        f"output_dir={run}",
        *overrides,
    ]


def train(command: list[str], run: Path, log: Path, launch: Launch, console: Console) -> RunSummary:
    """Train, resume what was interrupted, or keep what is finished.

    Args:
        command: From `training_command`.
        run: The run's folder.
        log: Takes all that the processes print.
        launch: The processes' environment.
        console: Shows the latest metrics.

    Raises:
        StageFailed: The command failed.
    """
    summary = run / SUMMARY_FILE
    if not summary.exists():
        # Also without a checkpoint: it may have ended before its first.
        resume = ["--resume"] if (run / "recipe.yaml").exists() else []
        metrics = run / METRICS_FILE
        exit_code = run_logged([*command, *resume], launch.environment, log, metrics, console)
        # the launcher exits with 0 when its processes were killed, so the summary decides
        if not summary.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            sentence = f"error: a training failed for the reason above; its output is in {log}"
            raise StageFailed(f"{tail}\n{sentence}", exit_code or 1)
    values = json.loads(summary.read_text())
    return RunSummary(**{name: values[name] for name in RunSummary.__dataclass_fields__})


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port: int = server.getsockname()[1]
        return port


def run_logged(
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
    """The latest row of a run, in a line."""
    try:
        row = json.loads(metrics.read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return "starting"  # no row yet, or one half written
    return (
        f"step {row['pretrain/step']}, loss {row['pretrain/loss']:.4f}, "
        f"{row['images_per_second']:.0f} images/s"
    )
