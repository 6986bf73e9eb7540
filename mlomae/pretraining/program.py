"""The pretraining program: MAE and MLO-MAE from a recipe to engines, streams and a task."""

import torch
from torch import nn

from mlomae.foreign import check_weights
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.images import LevelImages, plan_images
from mlomae.pretraining.mae import BaselineReconstruction, baseline_scorer
from mlomae.pretraining.mlo_mae import (
    HEAD_LOSSES,
    CoupledReconstruction,
    FrozenReconstruction,
    LevelLoss,
    level_losses,
)
from mlomae.pretraining.networks import BUILDERS, build_model, load_initial_weights
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.pretraining.task import MaePretraining, MloMaePretraining, Pretraining
from mlomae.training.engines import TrainingLevel
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles


class PretrainingProgram(Program[PretrainingRecipe]):
    """Plain MAE or MLO-MAE.

    Attributes:
        images: of each level, once `check` has looked at them.
    """

    schema = PretrainingRecipe
    images: dict[str, LevelImages]

    def module(self, recipe: PretrainingRecipe, name: str) -> nn.Module:
        """The untrained network of a level."""
        return BUILDERS[name](recipe)

    def check(self, job: Job[PretrainingRecipe]) -> None:
        """Images and initial weights must fit the recipe."""
        self.images = plan_images(job.recipe)
        if job.recipe.init_from and not job.is_continued:
            with torch.device("meta"):
                model = build_model(job.recipe)
            check_weights(model, job.recipe.init_from, expected=job.recipe.init_from_expected)

    def build(self, job: Job[PretrainingRecipe]) -> Pretraining:
        """Engines, and the method's task on them."""
        num_cycles = count_cycles(job.recipe, self.images["pretrain"].num_images)
        return build_task(job.recipe, build_levels(job, num_cycles), self.images)


def losses_of(recipe: PretrainingRecipe) -> dict[str, LevelLoss]:
    """The loss of each level of a recipe, and the levels which it reads."""
    if recipe.method == "mae":
        return {"pretrain": LevelLoss(BaselineReconstruction(baseline_scorer(recipe)))}
    is_frozen = recipe.masking.scores == "frozen"
    reconstruction = FrozenReconstruction if is_frozen else CoupledReconstruction
    head = HEAD_LOSSES[recipe.labelled.task]
    return level_losses(reconstruction(recipe.masking.weighting), head)


def build_levels(job: Job[PretrainingRecipe], num_cycles: int) -> dict[str, TrainingLevel]:
    """A DeepSpeed engine for each level of the recipe. All ranks must call."""
    recipe, levels = job.recipe, {}
    for name, loss in losses_of(recipe).items():
        module = BUILDERS[name](recipe)
        if isinstance(module, MaskedAutoencoder) and not job.is_continued:
            load_initial_weights(module, recipe)
        levels[name] = job.build_level(name, module, num_cycles=num_cycles, **loss._asdict())
    return levels


def build_task(
    recipe: PretrainingRecipe, levels: dict[str, TrainingLevel], images: dict[str, LevelImages]
) -> Pretraining:
    """The task of the recipe's method. All ranks must call.

    Raises:
        UserError: the recipe's estimator cannot work with these engines.
    """
    task = MaePretraining if recipe.method == "mae" else MloMaePretraining
    return task(recipe, levels, images)
