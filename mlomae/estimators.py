"""The hypergradient estimator that a recipe asks for."""

from mlomae.hypergrad import (
    ConjugateGradient,
    Estimator,
    FiniteDifference,
    Identity,
    Neumann,
    Sama,
    Truncated,
    Unrolled,
)
from mlomae.recipe import HypergradientRecipe


def build_estimator(recipe: HypergradientRecipe) -> Estimator:
    """An estimator of `mlomae.hypergrad` from the recipe's section."""
    estimator = _build_recursion(recipe)
    if recipe.relative_step is None and recipe.radius is None:
        return estimator
    return FiniteDifference(estimator, relative_step=recipe.relative_step, radius=recipe.radius)


def _build_recursion(recipe: HypergradientRecipe) -> Estimator:
    steps = {"pretrain": recipe.pretrain_steps, "classifier": recipe.classifier_steps}
    match recipe.estimator:
        case "unrolled":
            return Unrolled(steps)
        case "truncated":
            return Truncated(steps)
        case "identity":
            return Identity()
        case "sama":
            return Sama()
        case "neumann":
            return Neumann(recipe.terms, recipe.step_size)
        case "conjugate_gradient":
            return ConjugateGradient(recipe.iterations, recipe.tolerance, recipe.damping)
