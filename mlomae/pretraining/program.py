"""The pretraining program: MAE and MLO-MAE from a recipe to engines, streams and a method."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlomae.errors import UserError
from mlomae.foreign import check_weights
from mlomae.pretraining.images import LevelImages, plan_images
from mlomae.pretraining.mae import BaselineReconstruction, Mae, baseline_scorer
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import (
    HEAD_LOSSES,
    LEVELS,
    CoupledReconstruction,
    FrozenReconstruction,
    MloMae,
)
from mlomae.pretraining.networks import BUILDERS, build_model, load_initial_weights
from mlomae.pretraining.recipe import Recipe
from mlomae.pretraining.task import Pretraining
from mlomae.recipe.hypergradient import build_estimator
from mlomae.training.command_line import launch
from mlomae.training.engines import TrainingLevel
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles


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
