"""The sections on what is trained: model and masking."""

import math
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from mlomae.models.attention import BACKENDS
from mlomae.models.mae import num_kept
from mlomae.models.masking import LightMaskingNetwork
from mlomae.models.registry import PRESETS
from mlomae.recipe.section import BelowOne, Fraction, Refusal, Section, Sides, nearest

PRESET_SIZES = ("embed_dim", "depth", "num_heads")


class EncoderRecipe(Section):
    """The encoder: a ViT."""

    preset: str | None = None
    """Encoder size by name, vit_tiny to vit_huge; fills embed_dim, depth and num_heads."""
    image_size: Sides
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
    """Hidden width of a block's MLP over its width."""
    drop_path_rate: BelowOne = 0.0
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
        set_values = {key: value for key, value in values.items() if value is not None}
        return {**dict(sizes), **set_values}

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
        return self


class ModelRecipe(EncoderRecipe):
    """Encoder and decoder."""

    decoder_embed_dim: PositiveInt = 512
    """Width of the decoder."""
    decoder_depth: PositiveInt = 8
    """Number of decoder blocks."""
    decoder_num_heads: PositiveInt = 16
    """Attention heads of a decoder block."""
    norm_pix_loss: bool = True
    """Standardise each target patch by its mean and variance."""
    trainable_positions: bool = False
    """Train the position embeddings, which start as 2-D sine-cosine tables."""

    @model_validator(mode="after")
    def _check_decoder(self) -> Self:
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

    mask_ratio: Fraction = 0.75
    """Share of the patches which is hidden."""
    mask_ratio_end: Fraction | None = None
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
