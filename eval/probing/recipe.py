"""The recipe of a linear probe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from mlomae.recipe import EncoderRecipe, LabelledRecipe, LevelRecipe, SingleLevelRecipe
from mlomae.recipe.section import Fraction, Refusal

LEVEL = "probe"

_Rates = Annotated[
    tuple[PositiveFloat, ...],
    BeforeValidator(lambda v: (v,) if isinstance(v, int | float) else v),
    Field(strict=False),
]

NORM_EPS = {"mae": 1e-6, "mae_ct": 1e-5, "held_out": 1e-5}
"""What each protocol's batch norm adds to the variance."""
_UNUSED = ("decay_norm_and_bias", "gradient_clipping")


class ProbeLevelRecipe(LevelRecipe):
    """Batches, optimizer and rates of the heads."""

    batch_size: Annotated[PositiveInt, Field(ge=2)]
    """Images per optimizer step over all ranks; the batch norm's statistics are theirs."""
    gradient_accumulation_steps: PositiveInt = 1
    """Parts in which a rank's images pass the encoder, for less memory; the result is the same."""
    optimizer: Literal["lars", "sgd"] = "sgd"  # type: ignore[assignment]
    """LARS of MAE's protocol (ZeRO stage 0 alone), or SGD with momentum."""
    base_lrs: _Rates
    """Peak learning rate at 256 images per step of each head, all trained in one pass; lr and
    base_lr are those of the fastest."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the linear weights, coupled; the published protocols have none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_base_lr(cls, values: Any) -> Any:
        """The level's rate is that of its fastest head; a single one may be called base_lr."""
        if not isinstance(values, dict):
            return values
        rates, base_lr = values.get("base_lrs"), values.get("base_lr")
        if rates is None and isinstance(base_lr, int | float):
            return {**values, "base_lrs": (base_lr,)}
        if base_lr is not None:
            return values
        listed = rates if isinstance(rates, list | tuple) else (rates,)
        # that there are none, or others than numbers among them, the field's check says
        numbers = [float(rate) for rate in listed if type(rate) in (int, float)]
        return {**values, "base_lr": max(numbers, default=1.0)}

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if not self.base_lrs:
            raise Refusal("base_lrs", "is empty: give a rate for each head")
        if self.base_lr != max(self.base_lrs):
            problem = f"is {self.base_lr:g}, but the largest of base_lrs is {max(self.base_lrs):g}"
            raise Refusal("base_lr", f"{problem}: remove base_lr")
        if len(set(self.base_lrs)) < len(self.base_lrs):
            raise Refusal(
                "base_lrs", "holds a rate twice, and tells heads by their rate: remove it"
            )
        for key in _UNUSED:
            if getattr(self, key) != LevelRecipe.model_fields[key].default:
                raise Refusal(key, "is set, but a linear probe has no use for it: remove it")
        return self


class ProbeDataRecipe(LabelledRecipe):
    """The images of a linear probe."""

    held_out_fraction: Fraction = 0.1
    """Share of the training images that the head is chosen on, and no head is trained on, drawn by
    class and seed; protocol held_out only."""


class ProbeRecipe(SingleLevelRecipe):
    """Linear heads on the features of a frozen encoder."""

    level_name: ClassVar = LEVEL
    activity: ClassVar = "a linear probe"

    method: Literal["linear_probe"]
    protocol: Literal["mae", "mae_ct", "held_out"]
    """What is reported. mae: the one head after the last epoch. mae_ct: the best head after the
    best epoch, selected on the test images. held_out: the head that is best on held-out training
    images after the last epoch."""
    model: EncoderRecipe
    data: ProbeDataRecipe
    probe: ProbeLevelRecipe

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        num_heads = len(self.probe.base_lrs)
        if self.protocol == "mae" and num_heads > 1:
            problem = f"holds {num_heads} rates, but protocol mae trains one head: give one"
            raise Refusal("probe.base_lrs", f"{problem}, or choose protocol held_out")
        default = ProbeDataRecipe.model_fields["held_out_fraction"].default
        if self.protocol != "held_out" and self.data.held_out_fraction != default:
            problem = f"is set, but protocol {self.protocol} holds nothing out: remove it"
            raise Refusal("data.held_out_fraction", problem)
        if not self.init_from:
            problem = "is missing: give the encoder's weights, a run of this project or a file"
            raise Refusal("init_from", problem)
        return self
