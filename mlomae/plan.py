"""What is checked before anything is built: recipe, DeepSpeed config, weights, data, folder."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from data_ffcv import Augmentation, ImagesInfo, choose_backend, inspect_images, split_by_class
from mlomae import checkpoint
from mlomae._ranks import launched_rank, launched_world_size
from mlomae.deepspeed_config import check_deepspeed_config, compute_dtype, load_deepspeed_config
from mlomae.errors import UserError
from mlomae.foreign import check_weights
from mlomae.models.attention import check_backend
from mlomae.recipe import Recipe, load_recipe
from mlomae.weights import BUILDERS, RECIPE_FILE, build_model


@dataclass(frozen=True)
class Plan:
    """A run that passed every check which needs no engine.

    Attributes:
        indices: samples of each level's stream; None for all.
        num_images: images of the pretrain stream.
        augmentations: of each level's stream.
        info: of the training images; while the plan lives, streams share it.
    """

    recipe: Recipe
    deepspeed_config: dict[str, Any]
    recipe_name: str
    config_name: str
    resume: bool
    indices: dict[str, np.ndarray | None]
    num_images: int
    augmentations: dict[str, Augmentation] = field(default_factory=dict)
    info: ImagesInfo | None = None


def make_plan(recipe_path: str, config_path: str, resume: bool, overrides: Sequence[str]) -> Plan:
    """Check recipe, DeepSpeed config, data and output folder, before anything is built.

    Raises:
        UserError, DataError: one sentence on what is wrong and how to mend it.
    """
    recipe = load_recipe(recipe_path, overrides)
    config = load_deepspeed_config(config_path)
    check_deepspeed_config(config, recipe, launched_world_size(), recipe_path, config_path)
    choose_backend(recipe.data.backend, recipe.data.train)
    info = inspect_images(recipe.data.train)
    if info.labels is None:
        raise UserError(
            f"data.train {recipe.data.train} holds masks: give a file with class labels"
        )
    indices: dict[str, np.ndarray | None] = {"pretrain": None}
    num_images = info.num_samples
    if recipe.method == "mlo_mae":
        if info.num_classes != recipe.data.num_classes:
            raise UserError(
                f"data.num_classes is {recipe.data.num_classes}, but {recipe.data.train} has "
                f"{info.num_classes} classes: set data.num_classes={info.num_classes}"
            )
        rest, part = split_by_class(info.labels, recipe.data.mask_fraction, recipe.seed)
        indices = {"pretrain": rest, "classifier": rest, "mask": part}
        num_images = len(rest)
    for name, level in recipe.levels.items():
        own = indices[name]
        count = num_images if own is None else len(own)
        if count < level.batch_size:
            raise UserError(
                f"{name}.batch_size is {level.batch_size}, but its stream has {count} images: "
                "lower it, or give more images"
            )
    augmentations = {
        name: (level.augmentation or recipe.data.augmentation).build(recipe.model.image_size)
        for name, level in recipe.levels.items()
    }
    for augmentation in augmentations.values():
        augmentation.check_fits(info)
    _check_model(recipe, config, resume)
    _check_output_dir(recipe, resume)
    return Plan(
        recipe, config, recipe_path, config_path, resume, indices, num_images, augmentations, info
    )


def is_continued(recipe: Recipe, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from."""
    return resume and checkpoint.latest(Path(recipe.output_dir) / "checkpoints") is not None


def _check_model(recipe: Recipe, config: dict[str, Any], resume: bool) -> None:
    """Refuse an attention kernel that cannot run here, and initial weights that do not fit."""
    check_backend(
        recipe.model.attention,
        torch.device(get_accelerator().device_name()),
        compute_dtype(config),
        recipe.model.embed_dim // recipe.model.num_heads,
    )
    if recipe.init_from and not is_continued(recipe, resume):
        with torch.device("meta"):
            model = build_model(recipe)
        check_weights(model, recipe.init_from, expected=recipe.init_from_expected)


def _check_output_dir(recipe: Recipe, resume: bool) -> None:
    folder = Path(recipe.output_dir)
    if not resume and any((folder / name).exists() for name in (RECIPE_FILE, "checkpoints")):
        raise UserError(
            f"output_dir {folder} holds another run: add --resume to continue it, or choose "
            "another output_dir"
        )
    probe = folder / f".write_test_{launched_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another, or mend "
            "its rights or space"
        ) from None
    needed, free = checkpoint_bytes(recipe), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir {folder} has {free / 2**30:.2f} GiB free, but a checkpoint takes about "
            f"{needed / 2**30:.2f} GiB: free some space, or choose another output_dir"
        )
    newest = checkpoint.latest(folder / "checkpoints") if resume else None
    if newest is not None:
        checkpoint.read_state(newest, recipe)
    elif (folder / RECIPE_FILE).exists():  # it ended before its first checkpoint
        checkpoint.refuse_other_recipe(folder, recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """About how large a checkpoint is: weights, fp32 masters and moments, and an fp32 export."""
    num_values = 0
    with torch.device("meta"):
        for name, level in recipe.levels.items():
            num_weights = sum(p.numel() for p in BUILDERS[name](recipe).parameters())
            num_values += num_weights * (5 if level.optimizer == "adamw" else 4)
    return 4 * num_values
