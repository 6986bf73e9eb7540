"""The masks of a run on the images of a folder, as one picture.

    python -m mlomae show-masks RUN --images DIR [--output FILE] [--num_images N]

Every row has an image, its scores, the visible patches, and the reconstruction. As many patches are
hidden as at the end of the run, without the noise of a draw around the scores.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data_ffcv import normalise_images
from mlomae.checkpoint.folders import find_checkpoint
from mlomae.distributed.start import report, set_up_logging
from mlomae.errors import UserError
from mlomae.models import Scorer
from mlomae.models.mae import num_kept
from mlomae.pretraining.mae import baseline_scorer
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.networks import load_masking_network, load_model
from mlomae.pretraining.pictures import mask_picture
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.training.monitor import save_picture

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main(run: str, images: str, output: str | None, num_images: int) -> int:
    """Draw the picture, say where it is, and return the exit code; 2 is bad input."""
    set_up_logging()
    try:
        file = Path(output) if output else default_output(Path(run), Path(images))
        print(draw(Path(run), Path(images), file, num_images))
    except UserError as error:
        report(error)
        return 2
    return 0


def draw(run: Path, folder: Path, file: Path, num_images: int) -> str:
    """Write the picture, replacing an earlier one, and return a sentence about it.

    Raises:
        UserError: the run, a flag or all images cannot be used, or the file cannot be written.
    """
    if num_images < 1:
        raise UserError(f"--num_images is {num_images}: give 1 or more")
    find_checkpoint(run)  # before a folder is made for the picture
    paths = find_images(folder)
    _check_output(file)
    model, recipe = load_model(run)
    shown = list(islice(read_images(paths, model.image_size), num_images))
    if not shown:
        raise UserError(f"none of the {len(paths)} images in {folder} can be read: give another")
    batch = normalise_images(np.stack(shown), recipe.data.mean, recipe.data.std)
    num_keep = num_kept(model.num_patches, MaskSchedule.of(recipe, 1).mask_ratio[1])
    with torch.no_grad():
        out = model(batch, scorer=_scorer(run, recipe, num_keep), num_keep=num_keep)
        picture = mask_picture(model, batch, out, recipe.data.mean, recipe.data.std)
    try:
        save_picture(picture, str(file))
    except OSError as error:
        raise _unwritable(file, error) from None
    return (
        f"{file}: {len(shown)} of {len(paths)} images, "
        f"{num_keep} of {model.num_patches} patches visible"
    )


def default_output(run: Path, folder: Path) -> Path:
    """RUN/masks_FOLDER.png; the picture of one of its checkpoints has that one's name, too."""
    name = f"masks_{folder.resolve().name}"
    if run.parent.name == "checkpoints":
        return run.parents[1] / f"{name}_{run.name}.png"
    return run / f"{name}.png"


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder: give one with images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        known = ", ".join(sorted(SUFFIXES))
        raise UserError(f"--images {folder} holds no image ({known}): give another folder")
    return paths


def read_images(paths: list[Path], image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The middle of each image, resized to (height, width): uint8 [height, width, 3].

    Images are turned upright as their EXIF data say. A file that cannot be read is named in the
    log and left out.
    """
    height, width = image_size
    for path in paths:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        # a broken PNG is a SyntaxError
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            logger.warning("left out %s: it cannot be read (%s)", path, error)
            continue
        yield np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def _scorer(run: Path, recipe: PretrainingRecipe, num_keep: int) -> Scorer:
    if recipe.method == "mlo_mae":
        return load_masking_network(run)
    return baseline_scorer(recipe)(torch.Generator().manual_seed(recipe.seed), num_keep)


def _check_output(file: Path) -> None:
    """Refuse a file that could not be written, before the work for it starts."""
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {file} has no ending of an image file: end it with .png")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be written ({error.strerror}): choose another --output")
