"""Checkpoints: one folder for all levels, written beside its final name and then renamed.

    output_dir/checkpoints/
        latest                      name of the newest complete checkpoint, for people and scripts
        step_00001500/              named after the encoder's step
            state.json              cycle, step counters, clock, number of ranks, file sizes
            recipe.yaml             the resolved recipe
            model.safetensors       whole fp32 weights under the published names, such as encoder
                                    and decoder of a pretraining
            masking.safetensors     masking network (mlo_mae)
            shared.safetensors      what else the task goes on from, such as a queue
            own_00000.safetensors   likewise, what each rank has of its own, such as averages
            random_00000.pt         random state of each rank
            pretrain/ classifier/ mask/     DeepSpeed's own files of each engine
        step_00001500.tmp/          one that was cut short; ignored, and removed by the next save

A checkpoint is complete once it bears its final name; the newest such folder is what is read. Older
ones are removed only after a newer one is complete.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import mlomae
from mlomae._checkpoint_writer import Writer, save_engine
from mlomae.errors import UserError
from mlomae.recipe import RunRecipe, differing_keys, dump_recipe, load_recipe
from mlomae.weights import RECIPE_FILE, complete_checkpoints, save_tensors

if TYPE_CHECKING:
    from mlomae.task import Task

logger = logging.getLogger(__name__)

FORMAT = 1
_TAG = "engine"  # DeepSpeed wants a folder name inside each level's folder
# what unpickling a damaged file raises, among others
_UNREADABLE = (
    *(OSError, RuntimeError, ValueError, EOFError, UnpicklingError, MemoryError),
    *(ArithmeticError, AttributeError, ImportError, LookupError, TypeError, SafetensorError),
)
_SHARED_FILE = "shared.safetensors"


@dataclass
class Progress:
    """Where a run stands, apart from its engines.

    Attributes:
        cycle: cycles finished.
        seconds: training time so far, over all launches.
    """

    cycle: int = 0
    seconds: float = 0.0


def save(folder: Path, task: "Task", progress: Progress, recipe: RunRecipe) -> Path:
    """Write a checkpoint and remove all but the newest `recipe.checkpoint.keep`.

    All ranks must call.

    Args:
        folder: the run's `checkpoints` folder, shared by all ranks.

    Raises:
        UserError: some rank could not write, on all ranks; older checkpoints are untouched.
    """
    start = time.perf_counter()
    final = folder / f"step_{task.first_level.num_steps:08d}"
    partial = final.with_suffix(".tmp")
    rank = dist.get_rank()
    writer = Writer(partial)
    if rank == 0:
        writer.attempt(_make_room, partial, list(task.levels))
    writer.agree()

    for name, level in task.levels.items():
        save_engine(level.engine, partial / name, _TAG, writer)
    for file, tensors in task.weights():
        if rank == 0:
            writer.attempt(save_tensors, tensors, partial / file)
    if own := task.rank_state():
        writer.attempt(save_tensors, own, partial / _own_file(rank))
    writer.attempt(torch.save, _random_state(), partial / f"random_{rank:05d}.pt")
    if rank == 0:
        if shared := task.shared_state():
            writer.attempt(save_tensors, shared, partial / _SHARED_FILE)
        writer.attempt((partial / RECIPE_FILE).write_text, dump_recipe(recipe))
    writer.agree()
    if rank == 0:
        writer.attempt(_publish, partial, final, _describe(task, progress))
    writer.agree()
    if rank == 0:
        _remove_old(folder, recipe.checkpoint.keep)
    logger.info("saved %s in %.1f s", final, time.perf_counter() - start)
    return final


def _make_room(partial: Path, names: list[str]) -> None:
    """Remove what was cut short, and make the folders which DeepSpeed would make unguarded."""
    for leftover in partial.parent.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    for name in names:
        (partial / name / _TAG).mkdir(parents=True)


def load(folder: Path, task: "Task", recipe: RunRecipe) -> Progress | None:
    """Restore the newest complete checkpoint into a freshly built task. All ranks must call.

    Returns:
        The progress it holds, or None when there is no checkpoint yet.

    Raises:
        UserError: it belongs to another recipe or number of ranks, or cannot be read.
    """
    for cut_short in folder.glob("step_*.tmp"):
        logger.info("ignored %s: its writing was cut short", cut_short)
    newest = latest(folder)
    if newest is None:
        return None
    state = read_state(newest, recipe)
    for name, level in task.levels.items():
        saved = state["levels"][name]
        if saved["engine"] != (own := _describe_engine(level.engine)):
            raise UserError(
                f"{newest} was written with {saved['engine']}, but the DeepSpeed config makes "
                f"{name} {own}: use the config that the run was started with"
            )
        try:
            level.engine.load_checkpoint(str(newest / name), tag=_TAG)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            raise _unreadable(newest, f"{name}: {reason}") from None
        level.num_steps = saved["num_steps"]
        level.num_skipped = saved["num_skipped"]
    try:
        task.load_state(_read(newest / _SHARED_FILE), _read(newest / _own_file(dist.get_rank())))
    except _UNREADABLE as error:
        raise _unreadable(newest, f"the task's state: {error!r}") from None
    _restore_random_state(torch.load(newest / f"random_{dist.get_rank():05d}.pt"))
    logger.info("resumed from %s", newest)
    return Progress(**state["progress"])


def _own_file(rank: int) -> str:
    return f"own_{rank:05d}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.exists() else {}


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints` folder."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def read_state(checkpoint: Path, recipe: RunRecipe) -> dict[str, Any]:
    """`state.json` of a checkpoint that fits the recipe and the number of ranks.

    Raises:
        UserError: it does not fit (names the keys or numbers), or is damaged (names the file).
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        version, files = state["format"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(checkpoint, f"state.json: {error}") from None
    if version != FORMAT:
        raise UserError(
            f"{checkpoint} has format {version}, this version reads {FORMAT}: "
            f"resume with mlomae {state['versions']['mlomae']}"
        )
    present = _file_sizes(checkpoint)
    for name, size in files.items():
        if present.get(name) != size:
            raise _unreadable(checkpoint, f"{name}: {present.get(name, 0)} of {size} bytes")
    refuse_other_recipe(checkpoint, recipe)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if state["world_size"] != world_size:
        raise UserError(
            f"{checkpoint} was written by {state['world_size']} ranks, but {world_size} were "
            "launched: launch as many (other numbers are not supported yet)"
        )
    return state


def refuse_other_recipe(folder: Path, recipe: RunRecipe) -> None:
    """Refuse to continue what the recipe in a run or checkpoint folder began differently.

    Raises:
        UserError: names the keys.
    """
    if differing := differing_keys(load_recipe(folder / RECIPE_FILE, (), type(recipe)), recipe):
        raise UserError(
            f"{folder} was trained with another recipe (differing keys: "
            f"{', '.join(differing)}): set them back, or choose another output_dir"
        )


def _unreadable(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"{checkpoint} is damaged ({reason}): remove it to continue from the one before it"
    )


def _describe(task: "Task", progress: Progress) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "progress": asdict(progress),
        "levels": {
            name: {
                "num_steps": level.num_steps,
                "num_skipped": level.num_skipped,
                "engine": _describe_engine(level.engine),
            }
            for name, level in task.levels.items()
        },
        "world_size": dist.get_world_size(),
        "versions": {"mlomae": mlomae.__version__, "torch": torch.__version__},
    }


def _describe_engine(engine: Any) -> str:
    """What decides how DeepSpeed lays out its files."""
    dtype = str(engine.get_data_types()[0]).removeprefix("torch.")
    return f"ZeRO stage {engine.zero_optimization_stage()} in {dtype}"


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _publish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Complete a written checkpoint with `state.json` and give it its name."""
    state["files"] = _file_sizes(partial)
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for name in [*state["files"], "state.json"]:
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(final)  # steps only grow between saves, so nothing bears this name yet
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename itself
    os.close(directory)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name)
    pointer.replace(final.parent / "latest")


def _remove_old(folder: Path, keep: int) -> None:
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # a file held open on NFS must not end the run


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
