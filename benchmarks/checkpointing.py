"""How long a checkpoint keeps training waiting, written in the background and not.

One process trains plain MAE or MLO-MAE on images that lie in memory. Rounds take turns: cycles
without a checkpoint, cycles with one that is waited for (`async_save: false`), cycles with one that
is written beside them (`async_save: true`). The table has medians over rounds:

    waits       seconds in which no training step ran because of the checkpoint
    cycle       seconds of a cycle beside it, which the background may slow down
    on disk     seconds from the start of the save to the complete checkpoint
    costs       what the round took longer than one without checkpoint
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from _about import HERE, about, save, table
from torch import Tensor

from mlomae.checkpoint import Progress, finish_saving, start_saving
from mlomae.distributed.start import start_ranks
from mlomae.pretraining.program import build_levels, build_task
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.pretraining.task import Pretraining
from mlomae.recipe import load_recipe
from mlomae.training.deepspeed_config import load_deepspeed_config
from mlomae.training.program import Job

KINDS = ("none", "waited for", "beside")


@dataclass
class Round:
    """What one round took, in seconds; `waits` and `on_disk` are 0 without a checkpoint."""

    total: float
    cycle: float
    waits: float = 0.0
    on_disk: float = 0.0


def _draw(task: Pretraining, name: str) -> tuple[Tensor, Tensor]:
    """Random images of a level, and labels."""
    model, level = task.recipe.model, task.recipe.levels[name]
    images = torch.randn(level.batch_size, 3, *model.image_size, device=task.device)
    return images, torch.zeros(level.batch_size, dtype=torch.int64, device=task.device)


@dataclass(frozen=True)
class _Images:
    num_images: int = 1_281_167  # sizes the schedule


def main() -> None:
    """Measure, and write the result."""
    arguments = _arguments()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    start_ranks()
    head = about("checkpointing.py", "cuda" if torch.cuda.is_available() else "cpu")
    recipe, task = _build(arguments)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        rounds, size = _measure(task, recipe, folder, arguments)
    finally:
        shutil.rmtree(folder)
    head["checkpoint"] = f"{arguments.recipe}, {size / 2**20:.0f} MiB, below {arguments.folder}"
    print(save(HERE / "results", "checkpointing", "Checkpointing", head, _table(rounds)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="mlo_mae_vit_base_patch16_imagenet")
    parser.add_argument("--deepspeed_config", default="ds_configs/cpu_zero2_fp32.json")
    parser.add_argument("--batch_size", type=int, default=2, help="of every level")
    parser.add_argument("--num_cycles", type=int, default=4, help="of a round")
    parser.add_argument("--num_rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write")
    return parser.parse_args()


def _build(arguments: argparse.Namespace) -> tuple[PretrainingRecipe, Pretraining]:
    names = ["pretrain", "classifier", "mask"]
    first = load_recipe(arguments.recipe, PretrainingRecipe)
    overrides = [f"{n}.batch_size={arguments.batch_size}" for n in names if n in first.levels]
    recipe = load_recipe(arguments.recipe, PretrainingRecipe, overrides)
    config = load_deepspeed_config(arguments.deepspeed_config)
    job = Job(recipe, config, arguments.recipe, arguments.deepspeed_config)
    levels = build_levels(job, num_cycles=10_000)
    images = {name: _Images() for name in recipe.levels}
    task = build_task(recipe, levels, images)  # type: ignore[arg-type]
    task.draw = partial(_draw, task)  # type: ignore[method-assign]
    return recipe, task


def _measure(
    task: Pretraining, recipe: PretrainingRecipe, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, list[Round]], int]:
    rounds: dict[str, list[Round]] = {kind: [] for kind in KINDS}
    task.cycle()  # allocations of the first
    size = 0
    for _ in range(arguments.num_rounds):
        for kind in KINDS:
            rounds[kind].append(_round(task, recipe, folder, kind, arguments.num_cycles))
            for checkpoint in folder.glob("step_*"):
                size = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
                shutil.rmtree(checkpoint)
    return rounds, size


def _round(
    task: Pretraining, recipe: PretrainingRecipe, folder: Path, kind: str, num_cycles: int
) -> Round:
    start = time.perf_counter()
    if kind == "none":
        cycle = median(_seconds(task.cycle) for _ in range(num_cycles))
        return Round(_since(start), cycle)
    saving = start_saving(folder, task, Progress(cycle=1), recipe)
    waits, on_disk = _since(start), 0.0
    if kind == "waited for":
        finish_saving(saving, keep=1)
        waits = on_disk = _since(start)
    cycles = []
    for _ in range(num_cycles):
        cycles.append(_seconds(task.cycle))
        if not on_disk and saving.is_written:  # as the trainer asks after each cycle
            waits += _seconds(lambda: finish_saving(saving, keep=1))
            on_disk = _since(start)
    if not on_disk:
        waits += _seconds(lambda: finish_saving(saving, keep=1))
        on_disk = _since(start)
    return Round(_since(start), median(cycles), waits, on_disk)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return _since(start)


def _since(start: float) -> float:
    return time.perf_counter() - start


def _table(rounds: dict[str, list[Round]]) -> list[str]:
    base = median(r.total for r in rounds["none"])
    rows = []
    for kind, found in rounds.items():
        total = median(r.total for r in found)
        values = (median(getattr(r, name) for r in found) for name in ("waits", "cycle", "on_disk"))
        rows.append([kind, *(f"{value:.2f} s" for value in values), f"{total - base:.2f} s"])
    return table(["checkpoint", "waits", "cycle", "on disk", "costs"], rows)


if __name__ == "__main__":
    main()
