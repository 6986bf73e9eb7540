"""The folder of a run, looked at before it is used."""

import shutil
from pathlib import Path

from mlomae.checkpoint.choice import newest_sound
from mlomae.checkpoint.folders import RECIPE_FILE
from mlomae.checkpoint.run_lock import lock
from mlomae.distributed.start import launched_rank
from mlomae.errors import UserError
from mlomae.recipe import RunRecipe, differing_keys, load_recipe


def check_output_dir(recipe: RunRecipe, resume: bool, needed: int) -> None:
    """Refuse a folder that holds another run, or that a checkpoint of `needed` bytes cannot go to.

    The first rank claims the folder for this launch.

    Raises:
        UserError: names the folder and the fix.
    """
    folder = recipe.output_dir
    if not resume and any((folder / name).exists() for name in (RECIPE_FILE, "checkpoints")):
        raise UserError(
            f"output_dir {folder} holds another run: add --resume to continue it, or choose "
            "another output_dir"
        )
    probe = folder / f".write_test_{launched_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if launched_rank() == 0:
            lock(folder)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another, or fix "
            "its rights or space"
        ) from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir {folder} has {free / 2**30:.2f} GiB free, but a checkpoint takes about "
            f"{needed / 2**30:.2f} GiB: free some space, or choose another output_dir"
        )
    newest = newest_sound(folder / "checkpoints") if resume else None
    if newest is not None:
        refuse_other_recipe(newest, recipe)
    elif (folder / RECIPE_FILE).exists():  # it ended before its first checkpoint
        refuse_other_recipe(folder, recipe)


def refuse_other_recipe(folder: Path, recipe: RunRecipe) -> None:
    """Refuse to continue what the recipe in a run or checkpoint folder began differently.

    Raises:
        UserError: names the keys.
    """
    if differing := differing_keys(load_recipe(folder / RECIPE_FILE, type(recipe)), recipe):
        raise UserError(
            f"{folder} was trained with another recipe (differing keys: "
            f"{', '.join(differing)}): set them back, or choose another output_dir"
        )
