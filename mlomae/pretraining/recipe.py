"""The recipe of pretraining: MAE and MLO-MAE."""

from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from mlomae.recipe.hypergradient import HypergradientRecipe
from mlomae.recipe.images import DataRecipe, DownstreamRecipe
from mlomae.recipe.levels import ClassifierRecipe, LevelRecipe
from mlomae.recipe.model import NETWORKS, MaskingRecipe, ModelRecipe
from mlomae.recipe.run import RunRecipe
from mlomae.recipe.section import Refusal


class PretrainingRecipe(RunRecipe):
    """Pretraining of a masked autoencoder."""

    method: Literal["mlo_mae", "mae"]
    """Learned masks (three levels) or random masks (pretrain alone)."""
    model: ModelRecipe
    masking: MaskingRecipe
    data: DataRecipe
    downstream: DownstreamRecipe | None = None
    pretrain: LevelRecipe
    classifier: ClassifierRecipe | None = None
    mask: LevelRecipe | None = None
    hypergradient: HypergradientRecipe = HypergradientRecipe()

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The levels which the method trains, by name, lowest first."""
        levels = {"pretrain": self.pretrain, "classifier": self.classifier, "mask": self.mask}
        return {name: level for name, level in levels.items() if level is not None}

    @property
    def labelled(self) -> DownstreamRecipe:
        """What classifier and mask learn from; the recipe must be one of `mlo_mae`."""
        if self.downstream is not None:
            return self.downstream
        assert self.data.num_classes is not None
        return DownstreamRecipe(
            task="classification", train=self.data.train, num_classes=self.data.num_classes
        )

    @model_validator(mode="before")
    @classmethod
    def _fill_network(cls, values: Any) -> Any:
        """Give the masking section the default network of the method."""
        if not isinstance(values, dict) or values.get("method") not in NETWORKS:
            return values
        masking = values.get("masking") or {}
        if not isinstance(masking, dict) or masking.get("network") is not None:
            return values
        return {**values, "masking": {**masking, "network": NETWORKS[values["method"]][0]}}

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for name in ("classifier", "mask"):
            is_there = getattr(self, name) is not None
            if self.method == "mlo_mae" and not is_there:
                raise Refusal(name, "is missing: method mlo_mae needs this section, add it")
            if self.method == "mae" and is_there:
                problem = "is given, but method mae trains no such level: remove the section"
                raise Refusal(name, problem)
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        is_given = self.data.num_classes is not None
        if self.downstream is not None and self.method != "mlo_mae":
            problem = (
                f"is given, but method {self.method} learns from no labels: remove the section"
            )
            raise Refusal("downstream", problem)
        if self.downstream is not None and is_given:
            problem = "is given, but the labels are those of downstream: remove it"
            raise Refusal("data.num_classes", problem)
        if self.method == "mlo_mae" and self.downstream is None and not is_given:
            problem = "is missing: method mlo_mae needs the number of classes, add it"
            raise Refusal("data.num_classes", problem)
        return self

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for name, level in self.levels.items():
            accumulation = level.gradient_accumulation_steps
            if name != "pretrain" and accumulation > 1:
                key = f"{name}.gradient_accumulation_steps"
                problem = f"is {accumulation}, but this level steps on one micro-batch: use 1"
                raise Refusal(key, problem)
            if name == "mask" and level.steps_per_cycle > 1:
                problem = f"is {level.steps_per_cycle}, but the mask steps once per cycle: use 1"
                raise Refusal("mask.steps_per_cycle", problem)
            if level.num_views > 1 and self.method != "mae":
                problem = f"is {level.num_views}, but several views are for method mae: use 1"
                raise Refusal(f"{name}.num_views", problem)
        return self

    @model_validator(mode="after")
    def _check_hypergradient(self) -> Self:
        if self.method != "mlo_mae":
            if self.hypergradient != HypergradientRecipe():
                problem = f"is given, but method {self.method} has none: remove the section"
                raise Refusal("hypergradient", problem)
            return self
        for name in ("pretrain", "classifier"):
            unrolled = getattr(self.hypergradient, f"{name}_steps")
            taken = self.levels[name].steps_per_cycle
            if unrolled > taken:
                problem = (
                    f"is {unrolled}, but {name}.steps_per_cycle is {taken}: lower the one or "
                    "raise the other"
                )
                raise Refusal(f"hypergradient.{name}_steps", problem)
        return self

    @model_validator(mode="after")
    def _check_checkpointing(self) -> Self:
        section = self.hypergradient
        has_tangents = section.relative_step is None and section.radius is None
        needs_hessian = section.estimator in ("neumann", "conjugate_gradient") or (
            section.estimator == "unrolled" and section.pretrain_steps > 1
        )
        if self.model.activation_checkpointing and needs_hessian and has_tangents:
            problem = (
                f"is true, but estimator {section.estimator} differentiates the encoder's blocks "
                "twice here: set it to false, unroll one pretrain step, or use truncated"
            )
            raise Refusal("model.activation_checkpointing", problem)
        return self

    @model_validator(mode="after")
    def _check_masking(self) -> Self:
        network, known = self.masking.network, NETWORKS[self.method]
        if network not in known:
            problem = f"is {network}, but method {self.method} has {' and '.join(known)}: use one"
            raise Refusal("masking.network", problem)
        try:
            self.masking.check_ratios(self.model.num_patches)
        except Refusal as refusal:
            raise Refusal(f"masking.{refusal.key}", refusal.problem) from None
        return self
