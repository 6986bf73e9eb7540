"""Names and places of what a run leaves."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from mlomae.errors import UserError

MODEL_FILE = "model.safetensors"


MASKING_FILE = "masking.safetensors"


RECIPE_FILE = "recipe.yaml"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest complete one) or by itself.

    Raises:
        UserError: there is no complete checkpoint at the path.
    """
    folder = Path(path)
    if (folder / MODEL_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give a run's output_dir or one of its checkpoints")
    complete = [
        c for c in complete_checkpoints(folder / "checkpoints") if (c / MODEL_FILE).is_file()
    ]
    if not complete:
        is_run = (folder / RECIPE_FILE).exists()  # one around runs has no recipe
        inner = [] if is_run else sorted(path.parent for path in folder.glob("*/checkpoints"))
        fix = (
            f"give {' or '.join(map(str, inner))}" if inner else "train first, or give another run"
        )
        raise UserError(f"{folder} holds no complete checkpoint: {fix}")
    return complete[-1]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if not path.suffix)  # .tmp, .damaged


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file that has the rights of its folder."""
    save_file(tensors, file, metadata={"format": "pt"})  # Transformers asks for the format
    with suppress(OSError):  # some file systems have no rights
        file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read it
