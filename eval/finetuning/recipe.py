"""The keys of a recipe that fine-tunes a classifier."""

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, model_validator
from typing_extensions import Self

from mlomae.recipe import EncoderRecipe, LabelledRecipe, LevelRecipe, SingleLevelRecipe
from mlomae.recipe.section import (
    BelowOne,
    Betas,
    Fraction,
    Probability,
    Refusal,
    Section,
    UpToOne,
)

LEVEL = "finetune"


class MixupRecipe(Section):
    """Mixing images with others of their batch, and their labels alike."""

    mixup_alpha: NonNegativeFloat = 0.8
    """Parameter of the Beta distribution of the images' shares; 0 is off."""
    cutmix_alpha: NonNegativeFloat = 1.0
    """Parameter of the Beta distribution of the rectangles' areas in CutMix; 0 is off."""
    prob: Probability = 1.0
    """Probability of mixing at all."""
    switch_prob: Probability = 0.5
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

    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments; adamw only."""
    layer_decay: UpToOne = 1.0
    """Factor on the learning rate for each layer between a weight and the head; 1 is off."""
    label_smoothing: BelowOne = 0.0
    """Share of each label that is spread evenly over all classes."""
    dropout: BelowOne = 0.0
    """Dropout probability before the head."""
    ema_decay: Fraction | None = None
    """What a moving average of the weights keeps of itself in each step; null is off."""


class FinetuneRecipe(SingleLevelRecipe):
    """A classifier that starts from a pretrained encoder."""

    level_name: ClassVar = LEVEL
    activity: ClassVar = "fine-tuning"

    method: Literal["finetune"]
    """Train encoder and head on labels."""
    model: FinetuneEncoderRecipe
    data: LabelledRecipe
    finetune: FinetuneLevelRecipe
    mixup: MixupRecipe | None = None
