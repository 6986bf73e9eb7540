"""Checkpoints: one folder for all levels, written beside its final name and then renamed.

    output_dir/checkpoints/
        latest                      name of the newest complete checkpoint
        step_00001500/              named after the encoder's step
            state.json              cycle, step counters, clock, number of ranks, versions
            recipe.yaml             the resolved recipe
            model.safetensors       encoder and decoder, fp32, under the published names
            masking.safetensors     masking network (mlo_mae)
            random_00000.pt         random state of each rank
            pretrain/ classifier/ mask/     DeepSpeed's own files of each engine
        step_00001500.tmp/          one that was cut short; ignored, and removed by the next save

A checkpoint is complete once it bears its final name. Nothing else is read, and older ones are
removed only after a newer one is complete.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import mlomae
from mlomae.engines import TrainingLevel
from mlomae.errors import UserError
from mlomae.recipe import Recipe, differing_keys, dump_recipe, load_recipe
from mlomae.weights import MASKING_FILE, MODEL_FILE, RECIPE_FILE

logger = logging.getLogger(__name__)

FORMAT = 1
_TAG = "engine"  # DeepSpeed wants a folder name inside each level's folder
_WEIGHTS = {"pretrain": MODEL_FILE, "mask": MASKING_FILE}


@dataclass
class Progress:
    """Where a run stands, apart from its engines.

    Attributes:
        cycle: cycles finished.
        seconds: training time so far, over all launches.
    """

    cycle: int = 0
    seconds: float = 0.0


def save(
    folder: Path, levels: dict[str, TrainingLevel], progress: Progress, recipe: Recipe
) -> Path:
    """Write a checkpoint and remove all but the newest `recipe.checkpoint.keep`.

    All ranks must call.

    Args:
        folder: the run's `checkpoints` folder, shared by all ranks.
    """
    start = time.perf_counter()
    final = folder / f"step_{levels['pretrain'].num_steps:08d}"
    partial = final.with_suffix(".tmp")
    rank = dist.get_rank()
    if rank == 0:
        for leftover in folder.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()

    for name, level in levels.items():
        level.engine.save_checkpoint(str(partial / name), tag=_TAG, save_latest=False)
        if name in _WEIGHTS:
            weights = _full_weights(level)
            if rank == 0:
                save_file(weights, partial / _WEIGHTS[name])
    torch.save(_random_state(), partial / f"random_{rank:05d}.pt")
    if rank == 0:
        (partial / RECIPE_FILE).write_text(dump_recipe(recipe))
        (partial / "state.json").write_text(json.dumps(_describe(levels, progress), indent=1))
    dist.barrier()
    if rank == 0:
        _publish(partial, final, recipe.checkpoint.keep)
    dist.barrier()
    logger.info("saved %s in %.1f s", final, time.perf_counter() - start)
    return final


def load(folder: Path, levels: dict[str, TrainingLevel], recipe: Recipe) -> Progress | None:
    """Restore the newest complete checkpoint into freshly built engines. All ranks must call.

    Returns:
        The progress it holds, or None when there is no checkpoint yet.

    Raises:
        UserError: it belongs to another recipe or number of ranks, or cannot be read.
    """
    newest = latest(folder)
    if newest is None:
        return None
    state = read_state(newest, recipe)
    for name, level in levels.items():
        path, _ = level.engine.load_checkpoint(str(newest / name), tag=_TAG)
        if path is None:
            raise UserError(f"{newest / name} cannot be read: remove {newest} to use an older one")
        level.num_steps = state["levels"][name]["num_steps"]
        level.num_skipped = state["levels"][name]["num_skipped"]
    _restore_random_state(torch.load(newest / f"random_{dist.get_rank():05d}.pt"))
    logger.info("resumed from %s", newest)
    return Progress(**state["progress"])


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints` folder."""
    complete = sorted(p for p in folder.glob("step_*") if p.suffix != ".tmp")
    for cut_short in folder.glob("step_*.tmp"):
        logger.warning("ignored %s: its writing was cut short", cut_short)
    return complete[-1] if complete else None


def read_state(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """`state.json` of a checkpoint that fits the recipe and the number of ranks.

    Raises:
        UserError: it does not fit; names the keys or numbers.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({error}): remove it to use an older one"
        ) from None
    if state["format"] != FORMAT:
        raise UserError(
            f"{checkpoint} has format {state['format']}, this version reads {FORMAT}: "
            f"resume with mlomae {state['versions']['mlomae']}"
        )
    if differing := differing_keys(load_recipe(checkpoint / RECIPE_FILE), recipe):
        raise UserError(
            f"{checkpoint} was trained with another recipe (differing keys: "
            f"{', '.join(differing)}): set them back, or choose another output_dir"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if state["world_size"] != world_size:
        raise UserError(
            f"{checkpoint} was written by {state['world_size']} ranks, but {world_size} were "
            "launched: launch as many (other numbers are not supported yet)"
        )
    return state


def _describe(levels: dict[str, TrainingLevel], progress: Progress) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "progress": asdict(progress),
        "levels": {
            name: {"num_steps": level.num_steps, "num_skipped": level.num_skipped}
            for name, level in levels.items()
        },
        "world_size": dist.get_world_size(),
        "versions": {"mlomae": mlomae.__version__, "torch": torch.__version__},
    }


def _full_weights(level: TrainingLevel) -> dict[str, Tensor]:
    """fp32 master weights and buffers, whole, on the CPU of every rank that needs them."""
    partition = level.level.partition
    masters = [shard.detach().flatten() for shard in partition.shards()]
    weights = {}
    for name in partition.shapes:  # one at a time: memory stays at the largest parameter
        whole = partition.gather([name], masters)[0][name]
        if dist.get_rank() == 0:
            weights[name] = whole.cpu().clone()
    buffers = level.engine.module.named_buffers()
    return weights | {name: buffer.float().cpu().contiguous() for name, buffer in buffers}


def _publish(partial: Path, final: Path, keep: int) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)  # the same step, reached again after a resume from an older one
    partial.rename(final)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name)
    pointer.replace(final.parent / "latest")
    complete = sorted(p for p in final.parent.glob("step_*") if p.suffix != ".tmp")
    for old in complete[:-keep]:
        shutil.rmtree(old)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
