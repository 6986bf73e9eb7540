"""What a recipe asks of every host: its files, its folder, and space for checkpoints there."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlomae.commands.preflight.checks import Needs
from mlomae.contrastive.program import HeadProgram, TuneProgram
from mlomae.contrastive.recipe import STEPS, MaeCtRecipe
from mlomae.errors import UserError
from mlomae.pretraining.program import PretrainingProgram
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import RunRecipe, find_recipe, load_recipe, read_values
from mlomae.recipe.section import flatten
from mlomae.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from mlomae.training.program import Program, checkpoint_bytes

_FILE_KEYS = ("train", "test", "init_from", "head_from")
_STEP_PROGRAMS: dict[str, type[Program[Any]]] = dict(
    zip(STEPS, (PretrainingProgram, HeadProgram, TuneProgram), strict=True)
)


def read_needs(
    name: str,
    overrides: Sequence[str],
    config_name: str | None,
    output_dir: str | None,
    world_size: int | None,
    master_port: int,
) -> Needs:
    """What a recipe of any kind of run needs.

    The recipe itself is checked where it is one of pretraining, contrastive tuning included.

    Args:
        output_dir: in place of the recipe's.
        world_size: number of slots; None where there is no hostfile.

    Raises:
        UserError: recipe or DeepSpeed JSON are wrong, or do not fit each other or the slots.
    """
    values = read_values(find_recipe(name), overrides)
    folder = output_dir or values.get("output_dir")
    if not isinstance(folder, str):
        raise UserError(f"recipe {name} has no output_dir: give the recipe of a run that trains")
    runs = _runs(name, overrides, values)
    if config_name is not None:
        config = load_deepspeed_config(config_name)
        for run, _ in runs:
            if world_size is not None:
                check_deepspeed_config(config, run, world_size, name, config_name)
    space = sum(checkpoint_bytes(program, run) * _num_checkpoints(run) for run, program in runs)
    return Needs(_files(values), Path(folder).absolute(), space or None, master_port)


def _runs(
    name: str, overrides: Sequence[str], values: dict[str, Any]
) -> list[tuple[RunRecipe, Program[Any]]]:
    """The runs of a pretraining; those of evaluations belong to `eval`, which is not imported."""
    method = values.get("method")
    if method in ("mae", "mlo_mae"):
        return [(load_recipe(name, PretrainingRecipe, overrides), PretrainingProgram())]
    if method == "mae_ct":
        steps: MaeCtRecipe = load_recipe(name, MaeCtRecipe, overrides)  # type: ignore[type-var]
        return [(run, _STEP_PROGRAMS[step]()) for step, run in steps.runs().items()]
    return []


def _num_checkpoints(run: RunRecipe) -> int:
    """How many checkpoints lie below output_dir at once, the one that is being written included."""
    section = run.checkpoint
    if section.keep_every is None or section.interval_epochs is None:
        return section.keep + 1
    num_for_good = run.epochs / (section.interval_epochs * section.keep_every)
    return section.keep + 1 + math.floor(num_for_good)


def _files(values: dict[str, Any]) -> dict[str, Path]:
    """Absolute paths by the keys that name them."""
    files = {}
    for key, value in flatten(values):
        if key.split(".")[-1] not in _FILE_KEYS:
            continue
        listed = value if isinstance(value, list) else [value]
        for number, path in enumerate(path for path in listed if isinstance(path, str)):
            files[key if len(listed) == 1 else f"{key}[{number}]"] = Path(path).absolute()
    return files
