"""A run's weights in a folder that other libraries load: `python -m mlomae export RUN --format F`.

Reads the newest checkpoint of any run, whatever its ZeRO stage, in one process on the CPU. Beside
the weights the folder holds

    README.md      model card: what was trained, how, and the lines that load it
    recipe.yaml    the complete recipe
    metrics.json   what the run measured
    export.json    where the weights came from, and the checksum of every file

An earlier export is replaced only while every file in it still is what was written.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

import mlomae
from mlomae.checkpoint.folders import RECIPE_FILE, find_checkpoint
from mlomae.commands.export.card import load_lines, model_card, read_measurements, run_folder
from mlomae.commands.export.formats import (
    Exported,
    check_format,
    write_hf,
    write_onnx,
    write_safetensors,
    write_timm,
)
from mlomae.errors import UserError
from mlomae.pretraining.networks import load_model
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe

EXPORT_FILE = "export.json"
WRITERS: dict[str, Callable[[Exported, Path], None]] = {
    "timm": write_timm,
    "hf": write_hf,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def main(run: str, format: str, output: str | None) -> int:
    """Export as the command line asks, say how to load it, and return the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        exported, folder = _export(run, format, output)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    console.print(f"wrote {folder}: {', '.join(_file_names(folder))}", markup=False)
    console.print(f"\n{load_lines(format, exported, folder)}", markup=False)
    return 0


def export(run: str | Path, format: str, output: str | Path | None = None) -> Path:
    """Write the weights of a run's newest checkpoint, or of one checkpoint, for another library.

    Args:
        run: A run's output_dir, or one of its checkpoint folders.
        format: One of `WRITERS`.
        output: The folder to write; None for RUN/export/FORMAT.

    Returns:
        The folder.

    Raises:
        UserError: There is no such checkpoint, the format cannot hold the model or lacks its
            packages, or the folder holds something that an export did not write.
    """
    return _export(run, format, output)[1]


def _export(run: str | Path, format: str, output: str | Path | None) -> tuple[Exported, Path]:
    if format not in WRITERS:
        raise UserError(f"--format {format} is not known: use one of {', '.join(WRITERS)}")
    checkpoint = find_checkpoint(run).resolve()  # its parents are asked for, in `.` too
    # not resolved: a link is refused
    folder = Path(os.path.abspath(output or _default_folder(run, checkpoint) / format))
    _check_replaceable(folder)
    check_format(format, load_recipe(checkpoint / RECIPE_FILE, PretrainingRecipe))
    model, recipe = load_model(checkpoint)
    exported = Exported(checkpoint, recipe, model)
    with _written_at_once(folder) as partial:
        WRITERS[format](exported, partial)
        _describe(format, exported, partial)
    return exported, folder


def _describe(format: str, exported: Exported, folder: Path) -> None:
    """Add card, recipe and measurements, and then the checksums of everything."""
    measured = read_measurements(exported.checkpoint)
    texts = {
        "README.md": model_card(format, exported, measured),
        RECIPE_FILE: dump_recipe(exported.recipe),
        "metrics.json": json.dumps(measured, indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    contents: dict[str, Any] = {
        "format": format,
        "checkpoint": str(exported.checkpoint),
        "mlomae": mlomae.__version__,
        "sha256": {name: _checksum(folder / name) for name in _file_names(folder)},
    }
    (folder / EXPORT_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


# --- the folder --------------------------------------------------------------------------------


def _default_folder(run: str | Path, checkpoint: Path) -> Path:
    """RUN/export; a checkpoint's folder there when it was asked for by name."""
    folder = run_folder(checkpoint) / "export"
    was_named = Path(run).resolve() == checkpoint != run_folder(checkpoint)
    return folder / checkpoint.name if was_named else folder


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an untouched earlier export.

    Raises:
        UserError: names the folder and what is in the way.
    """
    if not os.path.lexists(folder):
        return
    fix = "choose another --output, or move it away"
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is a file or a link: {fix}")
    names = _file_names(folder)
    if not names and not any(folder.iterdir()):
        return
    written = _checksums(folder)
    if not written:
        raise UserError(f"{folder} holds something else than an export: {fix}")
    for name in names:
        if name != EXPORT_FILE and written.get(name) != _checksum(folder / name):
            raise UserError(f"{folder / name} was added or changed after the export: {fix}")


def _checksums(folder: Path) -> dict[str, str]:
    """The checksums in a folder's export.json; empty when it is none of ours."""
    try:
        written = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return written if isinstance(written, dict) else {}


@contextmanager
def _written_at_once(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name and place when all is written."""
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{s}") for s in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): choose another --output, or "
            "fix its rights or space"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _file_names(folder: Path) -> list[str]:
    """Every file below a folder, relative to it."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in files)


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
