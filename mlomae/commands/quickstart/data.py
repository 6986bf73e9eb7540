"""The quickstart's images: finding, converting, and fitting the recipe to them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from data_ffcv import BetonInfo, inspect_beton, split_by_class
from data_ffcv.convert import convert
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe

_ROOT = Path(__file__).resolve().parents[3]
_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DOWNLOADS = _ROOT / "data" / "fashion-mnist"

USER_IMAGE_SIZE, USER_PATCH_SIZE = 56, 14  # 16 patches, as the recipe has
USER_NUM_STEPS = 450  # as many encoder steps as the recipe takes on Fashion-MNIST
_SMALLEST_BATCH_SIZE = 8


@dataclass(frozen=True)
class Source:
    """Where the images come from, in the words of `data_ffcv.convert`."""

    format: str
    train: Path
    test: Path
    shortest_side: int | None = None


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def find_source(data: Path | None) -> Source:
    """Return the user's images, or Fashion-MNIST, downloaded where no package brought it.

    Raises:
        UserError: `data` lacks a folder, or the download failed.
    """
    if data is not None:
        return _find_folders(data)
    folder = _FASHION_MNIST if _FASHION_MNIST.is_dir() else _download_fashion_mnist()
    return Source("fashion-mnist", folder, folder)


def _find_folders(data: Path) -> Source:
    tests = [data / name for name in ("test", "val") if (data / name).is_dir()]
    if not (data / "train").is_dir() or not tests:
        raise UserError(
            f"--data {data} needs two folders, {data}/train and {data}/test (or val), with one "
            "folder of images per class in each"
        )
    # a little larger than the crops, as in the usual 256 pixels for crops of 224
    return Source("imagefolder", data / "train", tests[0], USER_IMAGE_SIZE * 8 // 7)


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(str(_DOWNLOADS), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST could not be downloaded ({error}): install Debian's package "
            "dataset-fashion-mnist, or give your own images with --data DIR"
        ) from None
    return Path(dataset.raw_folder)


def convert_images(source: Source, folder: Path, console: Console) -> tuple[BetonInfo, BetonInfo]:
    """Write train.beton and test.beton, unless they are there; return what they hold.

    Raises:
        DataError: An image cannot be read.
        UserError: Training and test images have different classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = _convert_split(source, "train", folder, console)
    test = _convert_split(source, "test", folder, console)
    if train.classes != test.classes:
        raise UserError(
            f"{source.train} and {source.test} have different class folders: give both the same "
            f"and delete {folder.parent}"
        )
    return train, test


def _convert_split(source: Source, split: str, folder: Path, console: Console) -> BetonInfo:
    out = folder / f"{split}.beton"
    if out.exists():
        return inspect_beton(out)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"  {out.name}", total=None)
        return convert(
            source.format,
            getattr(source, split),
            out,
            part=None if source.format == "imagefolder" else split,
            shortest_side=source.shortest_side,
            num_workers=num_cores(),
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def user_data_overrides(recipe: PretrainingRecipe, train: BetonInfo) -> list[str]:
    """Fit the quickstart's MLO-MAE recipe to the user's images, with its number of steps.

    Raises:
        UserError: There are too few images.
    """
    assert train.labels is not None  # as in all that the quickstart converts
    rest, held_out = split_by_class(train.labels, recipe.data.mask_fraction, recipe.seed)
    batch_size = recipe.pretrain.batch_size
    while batch_size > min(len(rest), len(held_out)):
        batch_size //= 2
    if batch_size < _SMALLEST_BATCH_SIZE:
        raise UserError(
            f"--data has {train.num_samples} training images, of which the mask level gets "
            f"{len(held_out)}, but a batch needs {_SMALLEST_BATCH_SIZE}: add images"
        )
    return [
        f"model.image_size={USER_IMAGE_SIZE}",
        f"model.patch_size={USER_PATCH_SIZE}",
        f"data.num_classes={train.num_classes}",
        "data.mean=[0.485, 0.456, 0.406]",
        "data.std=[0.229, 0.224, 0.225]",
        *(
            f"{name}.batch_size={min(level.batch_size, batch_size)}"
            for name, level in recipe.levels.items()
        ),
        f"epochs={epochs_of(USER_NUM_STEPS, len(rest), batch_size)}",
    ]


def mae_overrides(mlo_mae: Sequence[str], epochs: float) -> list[str]:
    """Turn the overrides of the MLO-MAE run into those of the plain MAE run to compare it with."""
    other = ("classifier.", "mask.", "epochs=")
    return [*(text for text in mlo_mae if not text.startswith(other)), f"epochs={epochs}"]


def epochs_of(num_steps: int, num_images: int, batch_size: int) -> float:
    """The epochs which make this number of steps; an epoch leaves its incomplete batch out.

    MLO-MAE's encoder sees its part of the images only, plain MAE's sees all, so equal steps are
    not equal epochs.
    """
    return num_steps / (num_images // batch_size)
