"""Tiny runs: their recipes, launches of them in one pair of processes, and what they leave."""

import errno
import hashlib
import importlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

NUM_CLASSES, NUM_IMAGES = 4, 80

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
PRETRAIN = {
    "batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_cycle": 2,
    "lr": 1e-3,
    "warmup_epochs": 0.5,
    "gradient_clipping": 0.5,
}
CLASSIFIER = {"batch_size": 8, "optimizer": "sgd", "lr": 1e-2, "dropout": 0.3}
MASK = {"batch_size": 8, "lr": 1e-2, "weight_decay": 0.01}


class Setup:
    """A folder with recipes, DeepSpeed configs and an output_dir for each run.

    Attributes:
        recipe: file of `mlo_mae`'s recipe by default, see `recipes`.
    """

    def __init__(self, folder: Path, beton: Path) -> None:
        self.folder = folder
        common = {
            "output_dir": str(folder / "run"),
            "model": SIZES,
            "data": {"train": str(beton), "num_classes": NUM_CLASSES},
            "pretrain": PRETRAIN,
            "checkpoint": {"keep": 2},
            "monitor": {"log_interval": 1, "num_pictures": 2},
        }
        # Four cycles of k1 = 2 each: mae's epoch has 5 steps of 16 images; mlo_mae keeps 16 of the
        # 80 images for its mask level, so its epoch has 4.
        mlo_mae = {"masking": {"hidden_dim": 16}, "classifier": CLASSIFIER, "mask": MASK}
        self.recipe = self._write(
            "mlo_mae.yaml", {"method": "mlo_mae", "epochs": 2, **common, **mlo_mae}
        )
        self.recipes = {
            "mlo_mae": self.recipe,
            "mae": self._write("mae.yaml", {"method": "mae", "epochs": 1.6, **common}),
        }

    def config(self, stage: int = 2, **extra: Any) -> str:
        """A DeepSpeed JSON for CPU."""
        values = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **extra,
        }
        name = hashlib.sha256(repr(values).encode()).hexdigest()[:8]
        return self._write(f"zero{stage}_{name}.json", values)

    def launch(
        self, run: str, *overrides: str, method: str = "mlo_mae", stage: int = 2, **more: Any
    ) -> dict[str, Any]:
        """What `drive` needs for one launch into the output_dir `run`."""
        return {
            "recipe": self.recipes[method],
            "deepspeed_config": self.config(stage),
            "resume": False,
            "overrides": [f"output_dir={self.folder / run}", *overrides],
        } | more

    def _write(self, name: str, values: dict[str, Any]) -> str:
        file = self.folder / name
        file.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
        return str(file)


def build_task(program: Any, launch: dict[str, Any]) -> Any:
    """The task of a launch on its engines, not yet opened. All ranks must call."""
    from mlomae.training.program import check_job, make_job

    names = launch["recipe"], launch["deepspeed_config"]
    job = make_job(program.schema, *names, False, launch["overrides"])
    check_job(program, job)
    return program.build(job)


def drive(launches: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Launch one run after the other in these processes. All ranks must call.

    Args:
        launches: arguments of `mlomae.training.command_line.launch` (`program` as
            "module:Class", pretraining unless given), and what shall befall the run:
            `kill` (rank, cycle): SIGTERM comes to this rank in this cycle, counted from 0;
            `full` (rank, texts): on this rank, writing a tensor file whose path holds all the
            texts fails for want of space;
            `bug` (rank, texts): the same for a reason that nobody has thought of;
            `stale` rank: on this rank, reading what a checkpoint holds fails;
            `slow` (rank, seconds): on this rank, writing each tensor file takes so much longer;
            `shell`: a command which the first rank runs before it.

    Returns:
        Exit code and stderr of each launch.
    """
    return [_launch(**launch) for launch in launches]


def _launch(
    kill: tuple[int, int] | None = None,
    full: tuple[int, tuple[str, ...]] | None = None,
    bug: tuple[int, tuple[str, ...]] | None = None,
    stale: int | None = None,
    slow: tuple[int, float] | None = None,
    shell: str | None = None,
    program: str = "mlomae.pretraining.program:PretrainingProgram",
    **arguments: Any,
) -> tuple[int, str]:
    from mlomae.training.command_line import launch

    module, name = program.split(":")
    chosen = getattr(importlib.import_module(module), name)()
    rank, stderr = dist.get_rank(), StringIO()
    if shell is not None and rank == 0:
        subprocess.run(["bash", "-ec", shell], check=True, timeout=10)
    dist.barrier()
    with ExitStack() as stack:
        # the process group must outlive the launch, and the wait is for a launcher
        stack.enter_context(mock.patch("torch.distributed.destroy_process_group"))
        stack.enter_context(mock.patch("mlomae.distributed.start.LAUNCHER_GRACE", 0))
        stack.enter_context(redirect_stderr(stderr))
        if kill is not None and kill[0] == rank:
            stack.enter_context(_sigterm_in_cycle(kill[1]))
        if full is not None and full[0] == rank:
            no_space = OSError(errno.ENOSPC, "No space left on device")
            stack.enter_context(_no_write_of(full[1], no_space))
        if bug is not None and bug[0] == rank:
            stack.enter_context(_no_write_of(bug[1], ValueError("odd")))
        if stale == rank:
            error = OSError(errno.ESTALE, "Stale file handle")
            stack.enter_context(mock.patch("mlomae.checkpoint.choice.checksum", side_effect=error))
        if slow is not None and slow[0] == rank:
            stack.enter_context(_slow_disk(slow[1]))
        code = launch(chosen, **arguments)
    return code, stderr.getvalue()


def _sigterm_in_cycle(cycle: int) -> Any:
    from mlomae.training.task import Task

    draw = Task.draw

    def draw_and_die(task: Task, name: str) -> Any:
        first = task.first_level.name
        steps_per_cycle = task.recipe.levels[first].steps_per_cycle
        if name == first and task.streams[first].batches_drawn == cycle * steps_per_cycle:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(task, name)

    return mock.patch.object(Task, "draw", draw_and_die)


def _no_write_of(texts: tuple[str, ...], error: Exception) -> Any:
    from mlomae.checkpoint.folders import save_tensors

    def save_or_fail(tensors: Any, file: Path) -> None:
        if all(text in str(file) for text in texts):
            raise error
        save_tensors(tensors, file)

    return mock.patch("mlomae.checkpoint.writer.save_tensors", save_or_fail)


def _slow_disk(seconds: float) -> Any:
    from mlomae.checkpoint.folders import save_tensors

    def save_slowly(tensors: Any, file: Path) -> None:
        time.sleep(seconds)
        save_tensors(tensors, file)

    return mock.patch("mlomae.checkpoint.writer.save_tensors", save_slowly)


# --- what a run leaves -------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, by its path; not of what says who used it last."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def checkpoints(run: Path) -> list[str]:
    """Names in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run without what a clock decides."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds", "images_per_second", "time/")
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(clocks)}
        for line in lines
    ]


def contents(checkpoint: Path) -> dict[str, str]:
    """A hash of every value in a checkpoint's tensor files, by file and key."""
    found: dict[str, str] = {}
    for file in sorted(checkpoint.rglob("*")):
        name = str(file.relative_to(checkpoint))
        if file.suffix == ".safetensors":
            for key, value in load_file(file).items():
                data = value.view(-1).view(torch.uint8).numpy().tobytes()
                digest = hashlib.sha256(data).hexdigest()
                found[f"{name}/{key}"] = f"{value.dtype} {list(value.shape)} {digest}"
    return found


@contextmanager
def mounted_tmpfs(folder: Path, num_bytes: int) -> Iterator[str]:
    """A small disk of its own in memory; yields why there is none, or an empty text."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    try:
        yield done.stderr.strip()
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)
