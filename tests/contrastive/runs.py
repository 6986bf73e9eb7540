"""Tiny MAE-CT runs: their recipe, and launches of them in one pair of processes."""

import json
import os
import signal
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist
import yaml
from PIL import Image

NUM_IMAGES = 80
NUM_STEPS = 4  # of head and tune
MODEL = {
    "image_size": 8,
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "global_pool": "avg",
}
STEP = {"epochs": NUM_STEPS / 5, "batch_size": 16, "lr": 1e-2, "warmup_epochs": 0.2}


class Setup:
    """A folder with images, a recipe and DeepSpeed configs, and an output_dir for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        for number in range(NUM_IMAGES):
            home = folder / "images" / f"class{number % 4}"
            home.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / f"{number}.png")
        self.recipe = self._write("recipe.yaml", self.values())

    def values(self) -> dict[str, Any]:
        """The recipe."""
        return {
            "method": "mae_ct",
            "output_dir": str(self.folder / "run"),
            "model": MODEL,
            "data": {"train": str(self.folder / "images")},
            "nnclr": {
                "queue_size": 32,
                "projector_hidden_dim": 16,
                "projection_dim": 8,
                "predictor_hidden_dim": 16,
            },
            "pretrain": {"epochs": 0.4, "batch_size": 16, "num_views": 2, "lr": 1e-3},
            "head": {**STEP, "weight_decay": 1e-5},
            "tune": {**STEP, "top_k": 3, "ema_decay": 0.5, "target_ema_decay": 0.9},
            "monitor": {"log_interval": 1, "num_pictures": 2},
        }

    def launch(self, run: str, *overrides: str, stage: int = 2, **more: Any) -> dict[str, Any]:
        """What `drive` needs for one launch into the output_dir `run`."""
        config = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "bf16": {"enabled": bool(more.pop("bf16", False))},
        }
        name = f"zero{stage}_{config['bf16']['enabled']}.json"
        return {
            "recipe": self.recipe,
            "deepspeed_config": self._write(name, config),
            "resume": False,
            "overrides": [f"output_dir={self.folder / run}", *overrides],
        } | more

    def _write(self, name: str, values: dict[str, Any]) -> str:
        file = self.folder / name
        file.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
        return str(file)


def drive(launches: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Launch one run after the other in these processes. All ranks must call.

    Args:
        launches: arguments of `launch_steps`, and perhaps `kill`, (step, rank, cycle): SIGTERM
            comes to this rank in this cycle of a step, counted from 0.

    Returns:
        Exit code and stderr of each launch.
    """
    return [_launch(**launch) for launch in launches]


def _launch(kill: tuple[str, int, int] | None = None, **arguments: Any) -> tuple[int, str]:
    from mlomae.contrastive.chain import launch_steps

    stderr = StringIO()
    dist.barrier()
    with ExitStack() as stack:
        # the process group must outlive the launch, and the wait is for a launcher
        stack.enter_context(mock.patch("torch.distributed.destroy_process_group"))
        stack.enter_context(mock.patch("mlomae.distributed.start.LAUNCHER_GRACE", 0))
        stack.enter_context(mock.patch("gc.collect"))  # DeepSpeed's, too: half of a tiny run's time
        stack.enter_context(redirect_stderr(stderr))
        if kill is not None and kill[1] == dist.get_rank():
            stack.enter_context(_sigterm_in(*kill))
        return launch_steps(**arguments), stderr.getvalue()


def _sigterm_in(step: str, rank: int, cycle: int) -> Any:
    from mlomae.training.task import Task

    draw = Task.draw

    def draw_and_die(task: Task, name: str) -> Any:
        if name == step and task.streams[name].batches_drawn == cycle:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(task, name)

    return mock.patch.object(Task, "draw", draw_and_die)
