"""The sections of a recipe: their keys with type, default and unit, and the checks within one."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from mlomae.models.attention import BACKENDS
from mlomae.models.mae import num_kept
from mlomae.models.masking import LightMaskingNetwork
from mlomae.models.registry import PRESETS

PRESET_SIZES = ("embed_dim", "depth", "num_heads")


class Refusal(ValueError):
    """A broken rule between keys, as a sentence `key problem`; the loader adds file and section."""

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key} {problem}")


def nearest(name: str, valid: list[str]) -> str:
    """Return the entry of `valid` most like `name`."""
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; an empty section is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Section(BaseModel):
    """What all sections share."""

    # strict: `image_size: true` or `epochs: "4"` is a slip, not a number
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


# YAML knows no tuples and no paths, so these two accept what stands for them
FilePath = Annotated[Path, Field(strict=False)]
# one stands for a list of one
_Listed = BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)
FilePaths = Annotated[tuple[FilePath, ...], _Listed, Field(strict=False)]
Names = Annotated[tuple[str, ...], _Listed, Field(strict=False)]
_Triple = Annotated[tuple[float, float, float], Field(strict=False)]
_PositiveTriple = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)]
_Sides = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(lambda v: (v, v) if type(v) is int else v),
    Field(strict=False),
]
_Fraction = Annotated[float, Field(gt=0, lt=1)]
_Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelRecipe(Section):
    """Encoder and decoder."""

    preset: str | None = None
    """Encoder size by name, vit_tiny to vit_huge; fills embed_dim, depth and num_heads."""
    image_size: _Sides
    """Height and width of the input, [height, width] or one number for a square, pixels."""
    patch_size: PositiveInt
    """Side of a square patch, pixels."""
    embed_dim: PositiveInt
    """Width of the encoder; wins over the preset's."""
    depth: PositiveInt
    """Number of encoder blocks; wins over the preset's."""
    num_heads: PositiveInt
    """Attention heads of an encoder block; wins over the preset's."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of a block's MLP over its width, encoder and decoder."""
    decoder_embed_dim: PositiveInt = 512
    """Width of the decoder."""
    decoder_depth: PositiveInt = 8
    """Number of decoder blocks."""
    decoder_num_heads: PositiveInt = 16
    """Attention heads of a decoder block."""
    norm_pix_loss: bool = True
    """Standardise each target patch by its own mean and variance."""
    trainable_positions: bool = False
    """Train the position embeddings, which start as 2-D sine-cosine tables."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the last encoder block, falling linearly to 0 at the first."""
    global_pool: Literal["token", "avg"] = "token"
    """Features of a whole image: the class token, or the mean of the patch tokens."""
    attention: str = "auto"
    """Attention kernel: auto, flash_attn, sdpa or math."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    compile_blocks: bool = False
    """Compile each block with torch.compile: faster steps after a slow first one; not at ZeRO-3."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per image, N."""
        return math.prod(self.grid_size)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(preset, str):
            return values
        if preset not in PRESETS:
            known = nearest(preset, list(PRESETS))
            raise Refusal("preset", f"is '{preset}', which is no preset: the nearest is {known}")
        sizes = zip(PRESET_SIZES, PRESETS[preset], strict=True)
        given = {key: value for key, value in values.items() if value is not None}
        return {**dict(sizes), **given}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for side in self.image_size:
            if side % self.patch_size:
                below = max(side // self.patch_size, 1) * self.patch_size
                problem = (
                    f"is {side}, which patch_size {self.patch_size} does not divide: "
                    f"use {below} or {below + self.patch_size}, or another patch_size"
                )
                raise Refusal("image_size", problem)
        if self.attention not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise Refusal("attention", f"is '{self.attention}', but must be one of {known}")
        if self.compile_blocks and self.drop_path_rate:
            problem = (
                "is true, but with drop_path_rate each block would be compiled anew, and most not "
                "at all: set one of the two to its default"
            )
            raise Refusal("compile_blocks", problem)
        _check_width("", self.embed_dim, self.num_heads)
        _check_width("decoder_", self.decoder_embed_dim, self.decoder_num_heads)
        return self


def _check_width(prefix: str, width: int, num_heads: int) -> None:
    """Refuse a width which the heads or the 2-D sine-cosine positions cannot split."""
    # positions: rows and columns get half of the width each, half of that is sines
    multiple = math.lcm(num_heads, 4)
    if width % multiple:
        problem = (
            f"is {width}, but must be divisible by {prefix}num_heads {num_heads} and by 4 "
            f"(sine-cosine positions): use a multiple of {multiple}"
        )
        raise Refusal(f"{prefix}embed_dim", problem)


NETWORKS = {"mlo_mae": ("mlp", "light"), "mae": ("random", "block")}
"""What may choose the masks in each method; the first is the default."""

_HIDDEN_DIMS = {"mlp": 512, "light": 128}


class MaskingRecipe(Section):
    """Which patches are hidden, and the network which learns it."""

    mask_ratio: _Fraction = 0.75
    """Share of the patches which is hidden."""
    mask_ratio_end: _Fraction | None = None
    """Share at the last step, reached linearly; null keeps mask_ratio."""
    network: Literal["mlp", "light", "random", "block"]
    """What scores the patches: mlp or light in mlo_mae, random or block in mae."""
    hidden_dim: PositiveInt = 512
    """Hidden width of the masking network, by default 512 for mlp, 128 for light; mlo_mae only."""
    selection: Literal["top_k", "gumbel_top_k"] = "top_k"
    """Hide the highest scores, or draw by score without replacement; mlo_mae only."""
    temperature: PositiveFloat = 1.0
    """Temperature of the draw: lower is closer to top_k; gumbel_top_k only."""
    temperature_end: NonNegativeFloat | None = None
    """Temperature at the last step, reached linearly; null keeps temperature."""
    weighting: Literal["published", "normalized"] = "published"
    """Divide the weighted loss by the number of hidden patches, or by their scores; mlo_mae
    only."""
    scores: Literal["frozen", "coupled"] = "frozen"
    """Whether encoder steps see through the scores; coupled is the public code; mlo_mae only."""

    @model_validator(mode="before")
    @classmethod
    def _fill_hidden_dim(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("hidden_dim") is not None:
            return values
        return {**values, "hidden_dim": _HIDDEN_DIMS.get(values.get("network", ""), 512)}

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        learned = self.network in NETWORKS["mlo_mae"]
        drawn = self.selection == "gumbel_top_k"
        for key, works, where in (
            ("selection", learned, f"network {self.network} has no scores to select by"),
            ("weighting", learned, f"network {self.network} has no scores to weigh by"),
            ("scores", learned, f"network {self.network} has no scores"),
            ("temperature", drawn, f"selection {self.selection} draws nothing"),
            ("temperature_end", drawn, f"selection {self.selection} draws nothing"),
        ):
            if not works and getattr(self, key) != type(self).model_fields[key].default:
                raise Refusal(key, f"is {getattr(self, key)}, but {where}: remove it")
        if self.network == "light" and self.hidden_dim % LightMaskingNetwork.NUM_HEADS:
            raise Refusal("hidden_dim", f"is {self.hidden_dim}: give network light a multiple of 4")
        return self

    def check_ratios(self, num_patches: int) -> None:
        """Refuse a share that keeps or hides every patch."""
        for key in ("mask_ratio", "mask_ratio_end"):
            ratio = getattr(self, key)
            if ratio is not None and not 0 < (kept := num_kept(num_patches, ratio)) < num_patches:
                problem = (
                    f"is {ratio}, which keeps {kept} of {num_patches} patches: change it or "
                    "model.patch_size so that at least one patch is kept and one is hidden"
                )
                raise Refusal(key, problem)


class AugmentationRecipe(Section):
    """Augmentation of the training images, the same in every level."""

    kind: Literal["random_resized_crop", "pad_crop", "center_crop"] = "random_resized_crop"
    """How image_size pixels are cut from an image."""
    scale: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = (0.2, 1.0)
    """Smallest and largest share of the area kept; random_resized_crop only."""
    padding: NonNegativeInt = 4
    """Zero pixels added on each side before the crop; pad_crop only."""
    flip: bool = True
    """Mirror left to right with probability one half."""
    interpolation: Literal["bicubic", "area"] = "bicubic"
    """Resizing kernel; bicubic is antialiased, area is faster."""

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        low, high = self.scale
        if not low <= high <= 1:
            raise Refusal("scale", f"is [{low}, {high}], but must be two rising shares in (0, 1]")
        return self


class DataRecipe(Section):
    """The training images."""

    train: FilePath
    """The training images, a .beton file."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Number of classes of the labels; mlo_mae requires it."""
    mask_fraction: _Fraction = 0.2
    """Share of the images kept for the mask level, drawn by class and seed; mlo_mae only."""
    mean: _Triple = (0.485, 0.456, 0.406)
    """Mean of each channel, pixel values in [0, 1]."""
    std: _PositiveTriple = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, pixel values in [0, 1]."""
    augmentation: AugmentationRecipe = AugmentationRecipe()
    num_workers: PositiveInt = 1
    """Loader threads per stream and rank."""


class LevelRecipe(Section):
    """Batches and optimizer of one level."""

    batch_size: PositiveInt
    """Images per optimizer step over all ranks and accumulation steps."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; pretrain only."""
    steps_per_cycle: PositiveInt = 1
    """Optimizer steps per cycle, k1 of pretrain and k2 of classifier; the mask takes one."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """PyTorch's AdamW, or SGD with momentum."""
    base_lr: PositiveFloat | None = None
    """Peak learning rate at 256 images per step; lr = base_lr * batch_size / 256."""
    lr: PositiveFloat
    """Peak learning rate; give this or base_lr."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; decoupled for adamw."""
    decay_norm_and_bias: bool = False
    """Decay 1-D parameters (biases and norms) as well."""
    betas: Annotated[tuple[_Beta, _Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the two moments; adamw only."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; adamw only."""
    momentum: _Beta = 0.9
    """Momentum; sgd only."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear warm-up from zero, epochs of the recipe; a half cosine to min_lr follows."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    gradient_clipping: NonNegativeFloat = 0.0
    """Largest global norm of the gradient; 0 is off."""

    @model_validator(mode="before")
    @classmethod
    def _fill_lr(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("lr") is not None:
            return values
        base_lr, batch_size = values.get("base_lr"), values.get("batch_size")
        if base_lr is None:
            raise Refusal("lr", "is missing: give lr or base_lr")
        if not isinstance(base_lr, int | float) or not isinstance(batch_size, int):
            return {**values, "lr": 1.0}  # the field's own check names the bad value
        return {**values, "lr": base_lr * batch_size / 256}

    @model_validator(mode="after")
    def _check_lr(self) -> Self:
        scaled = self.lr if self.base_lr is None else self.base_lr * self.batch_size / 256
        if not math.isclose(self.lr, scaled, rel_tol=1e-6):
            problem = (
                f"is {self.lr:g}, but base_lr {self.base_lr:g} at batch_size {self.batch_size} "
                f"gives {scaled:g}: remove one of the two (null removes a key)"
            )
            raise Refusal("lr", problem)
        if self.min_lr > self.lr:
            raise Refusal("min_lr", f"is {self.min_lr:g}, above lr {self.lr:g}: lower it")
        return self


class ClassifierRecipe(LevelRecipe):
    """The classifier level: batches, optimizer and head."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout probability before the last linear layer of the head."""


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
        for estimator, keys in ESTIMATOR_KEYS.items():
            own = ESTIMATOR_KEYS[self.estimator]
            for key in keys:
                if key not in own and getattr(self, key) != type(self).model_fields[key].default:
                    problem = f"is set, but estimator {self.estimator} has no such key: remove it"
                    raise Refusal(key, f"{problem}, or choose {estimator}")
        return self


class CheckpointRecipe(Section):
    """When to save; never changes results."""

    interval_epochs: PositiveFloat | None = None
    """Epochs between checkpoints; null saves only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints which are kept."""


class MonitorRecipe(Section):
    """What to watch; never changes results."""

    log_interval: PositiveInt = 10
    """Cycles between two records."""
    picture_interval_epochs: PositiveFloat | None = None
    """Epochs between two mask pictures; null draws one only at the end."""
    num_pictures: PositiveInt = 8
    """Images in a mask picture."""
