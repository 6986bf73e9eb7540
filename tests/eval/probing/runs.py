"""Tiny linear probes: their images, encoder and recipes, and launches in one group of processes."""

import json
import os
import shutil
import signal
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image

from mlomae.models import MaskedAutoencoder

NUM_CLASSES, NUM_TRAIN, NUM_TEST = 3, 90, 33
BATCH, EPOCHS = 18, 3
RATES = (4.0, 1.0, 0.1)
SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def write_images(folder: Path, num_images: int, seed: int) -> Path:
    """Noise around a colour per class, 8x8, in class folders."""
    rng = np.random.default_rng(seed)
    for number in range(num_images):
        label = number % NUM_CLASSES
        pixels = rng.normal(110, 40, (8, 8, 3)) + 40 * np.eye(3)[label]
        home = folder / f"class{label}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / f"{number:03d}.png")
    return folder


def tiny_encoder(seed: int = 5) -> MaskedAutoencoder:
    """Random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = {"decoder_embed_dim": 4, "decoder_depth": 1, "decoder_num_heads": 1}
        return MaskedAutoencoder(**SIZES, **small).eval()


class ProbeSetup:
    """A folder with images, an encoder, and recipes and DeepSpeed configs of probes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train = write_images(folder / "train", NUM_TRAIN, seed=0)
        self.test = write_images(folder / "test", NUM_TEST, seed=1)
        self.encoder = folder / "encoder.pth"
        self.other_encoder = folder / "other_encoder.pth"
        torch.save({"model": tiny_encoder().state_dict()}, self.encoder)
        torch.save({"model": tiny_encoder(seed=6).state_dict()}, self.other_encoder)

    def recipe(self, protocol: str, **probe: Any) -> str:
        """A recipe of a protocol."""
        rates, optimizer = ([150.0], "lars") if protocol == "mae" else (list(RATES), "sgd")
        level = {"batch_size": BATCH, "warmup_epochs": 0.6, "optimizer": optimizer}
        values = {
            "method": "linear_probe",
            "protocol": protocol,
            "epochs": EPOCHS,
            "output_dir": "given by the launch",
            "init_from": str(self.encoder),
            "model": SIZES,
            "data": {
                "train": str(self.train),
                "test": str(self.test),
                "num_classes": NUM_CLASSES,
                "augmentation": {"scale": [0.5, 1.0]},
            },
            "probe": level | {"base_lrs": rates} | probe,
            "monitor": {"log_interval": 1, "eval_interval_epochs": 1},
        }
        return self._write(f"{protocol}.yaml", yaml.safe_dump(values))

    def launch(
        self, run: str, protocol: str, *overrides: str, stage: int = 0, **more: Any
    ) -> dict[str, Any]:
        """What `drive` needs for one launch into the output_dir `run`."""
        bf16 = {"bf16": {"enabled": True}} if more.pop("bf16", False) else {}
        config = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            **bf16,
        }
        name = f"zero{stage}_bf16.json" if bf16 else f"zero{stage}.json"
        return {
            "run": run,
            "recipe": self.recipe(protocol),
            "deepspeed_config": self._write(name, json.dumps(config)),
            "resume": False,
            "overrides": [f"output_dir={self.folder / run}", *overrides],
        } | more

    def _write(self, name: str, text: str) -> str:
        file = self.folder / name
        file.write_text(text)
        return str(file)


def drive(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """Launch one probe after the other in these processes.

    Args:
        launches: arguments of `mlomae.training.command_line.launch` and the `run`; with `kill`
            (rank, cycle), SIGTERM comes to this rank in this cycle; with `copy` (from, to), a file
            is copied before.

    Returns:
        `launches`, the run, exit code and stderr of each, and `norm`, see `norm_batches`.
    """
    return {"launches": [_launch(**launch) for launch in launches], "norm": norm_batches()}


def features_of(batch: int, num_images: int = 12) -> torch.Tensor:
    """Features far from standardised, float64 [num_images, 6]."""
    generator = torch.Generator().manual_seed(batch)
    features = torch.randn(num_images, 6, generator=generator, dtype=torch.float64)
    return features * torch.arange(1, 7) + batch


def norm_batches() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs for this rank's part of three batches, and the statistics after them."""
    from eval.probing.heads import feature_norm

    norm, rank, size = feature_norm(6, 1e-6), dist.get_rank(), dist.get_world_size()
    parts = [features_of(batch).float().chunk(size)[rank] for batch in range(3)]
    return torch.stack([norm(part) for part in parts]), norm.state_dict()


def _launch(
    run: str,
    kill: tuple[int, int] | None = None,
    copy: tuple[Path, Path] | None = None,
    **arguments: Any,
) -> tuple[str, int, str]:
    from eval.probing.program import LinearProbeProgram
    from mlomae.training.command_line import launch

    stderr = StringIO()
    if copy is not None:
        shutil.copy(*copy)
    dist.barrier()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.distributed.destroy_process_group"))
        stack.enter_context(mock.patch("mlomae.distributed.start.LAUNCHER_GRACE", 0))
        stack.enter_context(redirect_stderr(stderr))
        if kill is not None and kill[0] == dist.get_rank():
            stack.enter_context(_sigterm_in_cycle(kill[1]))
        return run, launch(LinearProbeProgram(), **arguments), stderr.getvalue()


def _sigterm_in_cycle(cycle: int) -> Any:
    from eval.probing.task import LinearProbe

    step = LinearProbe.cycle

    def step_and_die(task: LinearProbe) -> None:
        if task.levels["probe"].num_steps_done == cycle:
            os.kill(os.getpid(), signal.SIGTERM)
        step(task)

    return mock.patch.object(LinearProbe, "cycle", step_and_die)
