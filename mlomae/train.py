"""The pretraining program: MAE and MLO-MAE from a recipe to engines, streams and a method."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from data_ffcv import ImagesInfo, choose_backend, inspect_images, split_by_class
from mlomae.engines import TrainingLevel
from mlomae.errors import UserError
from mlomae.estimators import build_estimator
from mlomae.foreign import check_weights
from mlomae.mae import BaselineReconstruction, Mae, baseline_scorer
from mlomae.masks import MaskSchedule
from mlomae.mlo_mae import (
    HEAD_LOSSES,
    LEVELS,
    CoupledReconstruction,
    FrozenReconstruction,
    MloMae,
)
from mlomae.pretraining import LevelImages, Pretraining
from mlomae.program import Job, Program, launch
from mlomae.recipe import AugmentationRecipe, Recipe
from mlomae.task import count_cycles
from mlomae.weights import BUILDERS, build_model, load_initial_weights


def main(recipe: str, deepspeed_config: str, resume: bool, overrides: Sequence[str]) -> int:
    """Pretrain as `launch/pretrain.py` was asked to, and return the exit code."""
    return launch(PretrainingProgram(), recipe, deepspeed_config, resume, overrides)


class PretrainingProgram(Program[Recipe]):
    """Plain MAE or MLO-MAE.

    Attributes:
        images: of each level, once `check` has looked at them.
    """

    schema = Recipe
    images: dict[str, LevelImages]

    def module(self, recipe: Recipe, name: str) -> nn.Module:
        """The untrained network of a level."""
        return BUILDERS[name](recipe)

    def check(self, job: Job[Recipe]) -> None:
        """Images and initial weights must fit the recipe."""
        self.images = plan_images(job.recipe)
        if job.recipe.init_from and not job.is_continued:
            with torch.device("meta"):
                model = build_model(job.recipe)
            check_weights(model, job.recipe.init_from, expected=job.recipe.init_from_expected)

    def build(self, job: Job[Recipe]) -> Pretraining:
        """Engines, and the method on them."""
        num_cycles = count_cycles(job.recipe, self.images["pretrain"].num_images)
        levels = build_levels(job, num_cycles)
        return Pretraining(job.recipe, build_method(job.recipe, levels), levels, self.images)


def plan_images(recipe: Recipe) -> dict[str, LevelImages]:
    """What each level draws from.

    The mask level gets its share of the labelled images, `classifier` the rest. `pretrain` gets
    the same rest where it trains on these images, all of its own where there is a section
    downstream, and all in plain MAE.

    Raises:
        UserError, DataError: they do not fit the recipe.
    """
    info = inspect_images(recipe.data.train)
    sources: dict[str, tuple[ImagesInfo, np.ndarray | None]] = {"pretrain": (info, None)}
    if recipe.method == "mlo_mae":
        labelled, rest, part = _split_labelled(recipe)
        sources |= {"classifier": (labelled, rest), "mask": (labelled, part)}
        if recipe.downstream is None:
            sources["pretrain"] = labelled, rest
    images = {}
    for name, level in recipe.levels.items():
        augmentation = _augmentation(recipe, name).build(recipe.model.image_size)
        images[name] = LevelImages(*sources[name], augmentation)
        if images[name].num_images < level.batch_size:
            raise UserError(
                f"{name}.batch_size is {level.batch_size}, but its stream has "
                f"{images[name].num_images} images: lower it, or give more images"
            )
        augmentation.check_fits(images[name].info)
        if augmentation.auto_augment and name != "pretrain" and images[name].info.has_masks:
            raise UserError(
                f"auto_augment {augmentation.auto_augment} would turn and shear the images of "
                f'{name}, but not their masks: set downstream.augmentation, with auto_augment ""'
            )
    return images


def _split_labelled(recipe: Recipe) -> tuple[ImagesInfo, np.ndarray, np.ndarray]:
    """The images of classifier and mask, and which of them are whose, drawn by class and seed."""
    labelled = recipe.labelled
    section = "data" if recipe.downstream is None else "downstream"
    choose_backend(recipe.data.backend, labelled.train)
    info = inspect_images(labelled.train)
    if info.has_masks != (labelled.task == "segmentation"):
        held, wanted = ("masks", "class labels") if info.has_masks else ("no masks", "masks")
        raise UserError(f"{section}.train {labelled.train} holds {held}: give a file with {wanted}")
    if info.num_classes != labelled.num_classes:
        raise UserError(
            f"{section}.num_classes is {labelled.num_classes}, but {labelled.train} has "
            f"{info.num_classes} classes: set {section}.num_classes={info.num_classes}"
        )
    labels = np.zeros(info.num_samples, int) if info.labels is None else info.labels
    return info, *split_by_class(labels, recipe.data.mask_fraction, recipe.seed)


def _augmentation(recipe: Recipe, name: str) -> AugmentationRecipe:
    """The level's own, else that of its labelled images, else that of all."""
    downstream = None if name == "pretrain" else recipe.downstream
    of_labelled = None if downstream is None else downstream.augmentation
    return recipe.levels[name].augmentation or of_labelled or recipe.data.augmentation


def build_levels(job: Job[Recipe], num_cycles: int) -> dict[str, TrainingLevel]:
    """A DeepSpeed engine for each level of the recipe. All ranks must call."""
    recipe, levels = job.recipe, {}
    for name in recipe.levels:
        module = BUILDERS[name](recipe)
        if name == "pretrain" and not job.is_continued:
            load_initial_weights(module, recipe)
        levels[name] = job.build_level(
            name, module, num_cycles=num_cycles, **coupling(recipe, name)
        )
    return levels


def coupling(recipe: Recipe, name: str) -> dict[str, Any]:
    """Loss of a level, and the levels which it reads."""
    if recipe.method == "mae":
        return {"loss": BaselineReconstruction(baseline_scorer(recipe))}
    if name != "pretrain":
        return LEVELS[name] | {"loss": HEAD_LOSSES[recipe.labelled.task]}
    frozen = recipe.masking.scores == "frozen"
    reconstruction = FrozenReconstruction if frozen else CoupledReconstruction
    return LEVELS[name] | {"loss": reconstruction(recipe.masking.weighting)}


def build_method(recipe: Recipe, levels: dict[str, TrainingLevel]) -> Mae | MloMae:
    """The recipe's method on its levels. All ranks must call.

    Raises:
        UserError: the recipe's estimator cannot work with these engines.
    """
    schedule = MaskSchedule.of(recipe, levels["pretrain"].total_steps)
    if recipe.method == "mae":
        return Mae(**levels, schedule=schedule)
    section = recipe.hypergradient
    try:
        return MloMae(
            **levels,
            estimator=build_estimator(section),
            keep_activations=section.keep_activations,
            schedule=schedule,
        )
    except ValueError as error:
        raise UserError(
            f"hypergradient.estimator {section.estimator} cannot be used: {error}"
        ) from None
