"""Checkpoints: one folder for all levels, written beside its final name and then renamed.

    output_dir/checkpoints/
        latest                      name of the newest complete checkpoint, for people and scripts
        step_00001500/              named after the first level's step
            state.json              cycle, step counters, clock, number of ranks, code version,
                                    size and CRC-32 of every file, and of this text
            recipe.yaml             the resolved recipe
            model.safetensors       whole fp32 weights under the published names, such as encoder
                                    and decoder of a pretraining
            masking.safetensors     masking network (mlo_mae)
            pretrain/ classifier/ mask/
                shards_00000.safetensors    what each rank has of a level: see `level_state.py`
            shared.safetensors      what else the task goes on from, such as a queue
            own_00000.safetensors   likewise, of which each rank has a part
            random_00000.safetensors        random state of each rank
        step_00001500.tmp/          one that was cut short; ignored, and removed by the next save
        step_00001000.damaged/      one that was skipped; ignored, and never removed

There is no pickle in them. A checkpoint is complete once it bears its final name; the newest sound
one is what is read, on any number of ranks and at any ZeRO stage. Older ones are removed only
after a newer one is complete.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import mlomae
from mlomae.checkpoint.choice import FORMAT, Damaged, read_state
from mlomae.checkpoint.folders import RECIPE_FILE, complete_checkpoints
from mlomae.checkpoint.level_state import StoredLevel, optimizer_state_keys, pieces, restore
from mlomae.checkpoint.writer import Saving
from mlomae.environment import git_commit
from mlomae.errors import UserError
from mlomae.hypergrad.partition import Vector
from mlomae.randomness import derive_seed
from mlomae.recipe import RunRecipe, dump_recipe

logger = logging.getLogger(__name__)

_SHARED_FILE = "shared.safetensors"


class SavedTask(Protocol):
    """What a checkpoint holds of a run; `mlomae.training.task.Task` says what each is."""

    @property
    def levels(self) -> Mapping[str, StoredLevel]: ...
    @property
    def first_level(self) -> StoredLevel: ...
    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]: ...
    def vectors(self) -> dict[str, dict[str, Vector]]: ...
    def shared_state(self) -> dict[str, Tensor]: ...
    def rank_state(self) -> dict[str, Tensor]: ...
    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor], /) -> None: ...


@dataclass
class Progress:
    """Where a run stands, apart from its engines.

    Attributes:
        cycle: cycles finished.
        seconds: training time so far, over all launches.
        evaluated: the last cycle after which such pictures and evaluations as were due are done.
    """

    cycle: int = 0
    seconds: float = 0.0
    evaluated: int = 0


def start_saving(
    folder: Path, task: SavedTask, progress: Progress, recipe: RunRecipe, *, for_good: bool = False
) -> Saving:
    """Copy everything that a checkpoint holds, and begin to write it in the background.

    All ranks must call, and all call `finish_saving` later on.

    Args:
        folder: the run's `checkpoints` folder, shared by all ranks.
        for_good: it stays when it is no longer among the newest.

    Raises:
        UserError: there is no room to begin in, on all ranks.
    """
    final = folder / f"step_{task.first_level.num_steps_done:08d}"
    files: dict[str, Any] = {}
    for file, tensors in task.weights():
        if dist.get_rank() == 0:
            files[file] = _copied(tensors)
    vectors, rank = task.vectors(), dist.get_rank()
    for name, level in task.levels.items():
        if held := pieces(level, vectors.get(name, {})):
            files[f"{name}/shards_{rank:05d}.safetensors"] = _copied(held)
    if of_rank := task.rank_state():
        files[_rank_file(rank)] = _copied(of_rank)
    files[_random_file(rank)] = _random_state()
    if rank == 0:
        if shared := task.shared_state():
            files[_SHARED_FILE] = _copied(shared)
        files[RECIPE_FILE] = dump_recipe(recipe)
    return Saving(final, files, _describe(task, progress, for_good) if rank == 0 else {})


def finish_saving(saving: Saving, keep: int) -> None:
    """Give a checkpoint its name, and remove all but the newest `keep` and those that stay.

    All ranks must call.

    Raises:
        UserError: some rank could not write, on all ranks; older checkpoints are untouched.
    """
    saving.publish()
    if dist.get_rank() == 0:
        _remove_old(saving.final.parent, keep)
    logger.info("saved %s", saving.final)


def load(checkpoint: Path, task: SavedTask, recipe: RunRecipe) -> Progress:
    """Restore a sound checkpoint into a freshly built task. All ranks must call.

    On as many ranks as wrote it everything goes on bit by bit. On another number, weights,
    optimizers, counters, queues and the order of the data do, and random draws (masks, dropout)
    begin anew.

    Returns:
        The progress it holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = read_state(checkpoint)
        vectors = task.vectors()
        for name, level in task.levels.items():
            saved = state["levels"][name]
            restore(level, vectors.get(name, {}), saved["optimizer"], checkpoint / name)
            level.set_counters(**saved["counters"])
        progress, num_writers = Progress(**state["progress"]), state["world_size"]
        of_rank = _read_rank_state(checkpoint, num_writers)
        task.load_state(_read(checkpoint / _SHARED_FILE), of_rank)
        _restore_random_state(checkpoint, num_writers, derive_seed(recipe.seed, progress.cycle))
    except UserError:
        raise
    except (Damaged, SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint} cannot be read ({reason}): launch again; if it stays so, remove it to "
            "continue from the one before it"
        ) from None
    logger.info("resumed from %s", checkpoint)
    if num_writers != dist.get_world_size():
        logger.info(
            "it was written by %d ranks, these are %d: masks and dropout draw anew from here on",
            num_writers,
            dist.get_world_size(),
        )
    return progress


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints` folder."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def _describe(task: SavedTask, progress: Progress, for_good: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "progress": asdict(progress),
        "levels": {
            name: {
                "counters": level.counters(),
                "optimizer": optimizer_state_keys(level),
                "zero_stage": level.model.zero_optimization_stage(),
                "dtype": str(level.dtype).removeprefix("torch."),
            }
            for name, level in task.levels.items()
        },
        "world_size": dist.get_world_size(),
        "for_good": for_good,
        "versions": {"mlomae": mlomae.__version__, "torch": torch.__version__, "git": git_commit()},
    }


def _remove_old(folder: Path, keep: int) -> None:
    for old in complete_checkpoints(folder)[:-keep]:
        try:
            if read_state(old)["for_good"]:
                continue
        except (Damaged, UserError):  # not this version's to judge
            continue
        going = old.with_suffix(".tmp")  # cut short, it must not look complete
        with suppress(OSError):  # such as a file held open on NFS, which must not end the run
            old.rename(going)
            shutil.rmtree(going)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory of their own on the CPU: training goes on while they are written."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _rank_file(rank: int) -> str:
    return f"own_{rank:05d}.safetensors"


def _random_file(rank: int) -> str:
    return f"random_{rank:05d}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.exists() else {}


def _read_rank_state(checkpoint: Path, num_writers: int) -> dict[str, Tensor]:
    """This rank's part of what was cut into equal parts along the first dimension."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if num_writers == world_size:
        return _read(checkpoint / _rank_file(rank))
    parts = [_read(checkpoint / _rank_file(writer)) for writer in range(num_writers)]
    wholes = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: whole.chunk(world_size)[rank].clone() for name, whole in wholes.items()}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(checkpoint: Path, num_writers: int, seed: int) -> None:
    rank = dist.get_rank()
    if num_writers != dist.get_world_size():
        torch.manual_seed(derive_seed(seed, rank))
        return
    state = load_file(checkpoint / _random_file(rank))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
