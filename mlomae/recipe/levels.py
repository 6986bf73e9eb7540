"""The sections on training: levels, hypergradient, checkpoints, monitoring."""

import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from mlomae.recipe.images import AugmentationRecipe
from mlomae.recipe.section import BelowOne, Betas, Refusal, Section


class LevelRecipe(Section):
    """Batches and optimizer of one level."""

    batch_size: PositiveInt
    """Images per optimizer step over all ranks and accumulation steps."""
    num_views: PositiveInt = 1
    """Crops of each image in a batch, drawn independently; base_lr counts them. pretrain of mae."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; pretrain only."""
    steps_per_cycle: PositiveInt = 1
    """Optimizer steps per cycle, k1 of pretrain and k2 of classifier; the mask takes one."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """PyTorch's AdamW, or SGD with momentum."""
    base_lr: PositiveFloat | None = None
    """Peak learning rate at 256 crops per step; lr = base_lr * batch_size * num_views / 256."""
    lr: PositiveFloat
    """Peak learning rate; give this or base_lr."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; decoupled for adamw."""
    decay_norm_and_bias: bool = False
    """Decay 1-D parameters (biases and norms) as well."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of the two moments; adamw only."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; adamw only."""
    momentum: BelowOne = 0.9
    """Momentum; sgd only."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear warm-up from zero, epochs of the recipe; the schedule follows."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """From lr to min_lr by a half cosine, or in a line."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest global norm of the gradient; 0 is off."""
    augmentation: AugmentationRecipe | None = None
    """Augmentation of this level's images; null takes data.augmentation."""

    @model_validator(mode="before")
    @classmethod
    def _fill_lr(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("lr") is not None:
            return values
        base_lr, batch_size = values.get("base_lr"), values.get("batch_size")
        num_views = values.get("num_views", cls.model_fields["num_views"].default)
        if base_lr is None:
            raise Refusal("lr", "is missing: give lr or base_lr")
        if not (
            isinstance(base_lr, int | float)
            and isinstance(batch_size, int)
            and isinstance(num_views, int)
        ):
            return {**values, "lr": 1.0}  # the field's check names the bad value
        return {**values, "lr": base_lr * batch_size * num_views / 256}

    @model_validator(mode="after")
    def _check_lr(self) -> Self:
        num_crops = self.batch_size * self.num_views
        scaled = self.lr if self.base_lr is None else self.base_lr * num_crops / 256
        if not math.isclose(self.lr, scaled, rel_tol=1e-6):
            problem = (
                f"is {self.lr:g}, but base_lr {self.base_lr:g} at {num_crops} crops per step "
                f"gives {scaled:g}: remove one of the two (null removes a key)"
            )
            raise Refusal("lr", problem)
        if self.min_lr > self.lr:
            raise Refusal("min_lr", f"is {self.min_lr:g}, above lr {self.lr:g}: lower it")
        return self


class ClassifierRecipe(LevelRecipe):
    """The classifier level: batches, optimizer and head."""

    dropout: BelowOne = 0.1
    """Dropout probability before the last linear layer of the head."""


class CheckpointRecipe(Section):
    """When to save; never changes results."""

    interval_epochs: PositiveFloat | None = None
    """Epochs between checkpoints; null saves only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints which are kept."""
    keep_every: PositiveInt | None = None
    """Also keep each of so many checkpoints at interval_epochs for good; null keeps none."""
    async_save: bool = True
    """Write in the background while training goes on; takes the checkpoint's size in memory."""

    @model_validator(mode="after")
    def _check_keep_every(self) -> Self:
        if self.keep_every is not None and self.interval_epochs is None:
            raise Refusal("keep_every", "is given without interval_epochs: add or remove one")
        return self


class MonitorRecipe(Section):
    """What to watch; never changes results."""

    log_interval: PositiveInt = 10
    """Cycles between two rows of metrics."""
    eval_interval_epochs: PositiveFloat | None = None
    """Epochs between two evaluations on the test images; null evaluates only at the end."""
    picture_interval_epochs: PositiveFloat | None = None
    """Epochs between two pictures; null draws one only at the end."""
    num_pictures: PositiveInt = 8
    """Images in a picture."""
    hang_timeout: PositiveFloat | None = 600
    """Seconds without a sign of work after which a rank is called hanging and the run ends; longer
    than the longest step, save or batch of an evaluation. Null waits for ever."""
