"""The hypergradient estimator that a recipe asks for."""

from typing import Literal

from pydantic import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

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
from mlomae.recipe.section import Refusal, Section

ESTIMATOR_KEYS: dict[str, tuple[str, ...]] = {
    "unrolled": ("pretrain_steps", "classifier_steps"),
    "truncated": ("pretrain_steps", "classifier_steps"),
    "identity": (),
    "sama": (),
    "neumann": ("terms", "step_size"),
    "conjugate_gradient": ("iterations", "tolerance", "damping"),
}


class HypergradientRecipe(Section):
    """How the mask's hypergradient is estimated; mlo_mae only."""

    estimator: Literal[
        "unrolled", "truncated", "identity", "sama", "neumann", "conjugate_gradient"
    ] = "unrolled"
    """Exact through real optimizer steps, or one of the approximations."""
    pretrain_steps: PositiveInt = 1
    """Newest encoder steps of a cycle to differentiate; unrolled and truncated only."""
    classifier_steps: PositiveInt = 1
    """Newest classifier steps of a cycle to differentiate; unrolled and truncated only."""
    terms: PositiveInt = 3
    """Terms of Neumann's series after the first; neumann only."""
    step_size: PositiveFloat = 0.1
    """Step size of Neumann's series, below two over the largest curvature; neumann only."""
    iterations: PositiveInt = 5
    """Iterations at most; conjugate_gradient only."""
    tolerance: NonNegativeFloat = 1e-6
    """Relative residual that ends the iterations; conjugate_gradient only."""
    damping: NonNegativeFloat = 0.0
    """Added to the Hessian's diagonal; conjugate_gradient only."""
    relative_step: PositiveFloat | None = None
    """Use finite differences that move the weights by this share of their norm."""
    radius: PositiveFloat | None = None
    """Use finite differences that move the weights by this 2-norm; the public code's is 0.01."""
    keep_activations: bool = True
    """Keep the encoder's activations of the classifier step until the mask step: less time, more
    memory."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.relative_step is not None and self.radius is not None:
            raise Refusal("radius", "is given beside relative_step: remove one of the two")
        usable = ESTIMATOR_KEYS[self.estimator]
        for estimator, keys in ESTIMATOR_KEYS.items():
            for key in keys:
                if key not in usable and getattr(self, key) != type(self).model_fields[key].default:
                    problem = f"is set, but estimator {self.estimator} has no such key: remove it"
                    raise Refusal(key, f"{problem}, or choose {estimator}")
        return self


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
