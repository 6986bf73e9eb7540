"""The keys of a recipe that fine-tunes a classifier."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, model_validator
from typing_extensions import Self

from mlomae.recipe import EncoderRecipe, LabelledRecipe, LevelRecipe, RunRecipe
from mlomae.recipe.section import Refusal, Section

LEVEL = "finetune"

_Probability = Annotated[float, Field(ge=0, le=1)]
_Beta = Annotated[float, Field(ge=0, lt=1)]


class MixupRecipe(Section):
    """Mixing images with others of their batch, and their labels alike."""

    mixup_alpha: NonNegativeFloat = 0.8
    """Parameter of the Beta distribution of the images' shares; 0 is off."""
    cutmix_alpha: NonNegativeFloat = 1.0
    """Parameter of the Beta distribution of the rectangles' areas in CutMix; 0 is off."""
    prob: _Probability = 1.0
    """Probability of mixing at all."""
    switch_prob: _Probability = 0.5
    """Probability of CutMix, where both are on."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """What shares one draw: a rank's batch, two images that mix with each other, or nothing."""

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if self.mixup_alpha == self.cutmix_alpha == 0:
            problem = "is 0 and so is cutmix_alpha, which mixes nothing: set mixup=null instead"
            raise Refusal("mixup_alpha", problem)
        return self


class FinetuneEncoderRecipe(EncoderRecipe):
    """The encoder, and what of it the head sees."""

    global_pool: Literal["token", "avg"] = "avg"
    """What the head sees: the mean of the patch tokens through a norm of its own, or the class
    token through the encoder's final norm."""


class FinetuneLevelRecipe(LevelRecipe):
    """Batches, optimizer and regularisation of fine-tuning."""

    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the two moments; adamw only."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for each layer between a weight and the head; 1 is off."""
    label_smoothing: _Beta = 0.0
    """Share of each label that is spread evenly over all classes."""
    dropout: _Beta = 0.0
    """Dropout probability before the head."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What a moving average of the weights keeps of itself in each step; null is off."""


class FinetuneRecipe(RunRecipe):
    """A classifier that starts from a pretrained encoder."""

    method: Literal["finetune"]
    """Train encoder and head on labels."""
    model: FinetuneEncoderRecipe
    data: LabelledRecipe
    finetune: FinetuneLevelRecipe
    mixup: MixupRecipe | None = None

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The only level."""
        return {LEVEL: self.finetune}

    @model_validator(mode="after")
    def _check_level(self) -> Self:
        for key in ("num_views", "steps_per_cycle"):
            if (number := getattr(self.finetune, key)) > 1:
                problem = f"is {number}, but fine-tuning has only one: remove it"
                raise Refusal(f"{LEVEL}.{key}", problem)
        return self
