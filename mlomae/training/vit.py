"""The encoder of evaluations: timm's VisionTransformer, under MAE's names and with its values."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mlomae.foreign import check_weights, load_weights
from mlomae.foreign.files import read_config
from mlomae.foreign.layouts import to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.models.attention import Attention
from mlomae.recipe import EncoderRecipe, RunRecipe

log = logging.getLogger(__name__)


def build_vit(recipe: EncoderRecipe, *, num_classes: int = 0, **options: Any) -> VisionTransformer:
    """An untrained ViT with the initial values that MAE gives its encoder.

    Positions are a parameter, as in MAE's fine-tuning, and start as 2-D sine-cosine tables.

    Args:
        num_classes: of the linear head; 0 for none.
        options: of timm's VisionTransformer, such as fc_norm or init_values (layer scale); they win
            over what the recipe says.
    """
    asked = {
        "img_size": recipe.image_size,
        "global_pool": recipe.global_pool,
        "drop_path_rate": recipe.drop_path_rate,
    }
    sizes = recipe.model_dump(
        include={"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}
    )
    vit = VisionTransformer(
        **sizes | asked | options,
        num_classes=num_classes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        attn_layer=Attention,
    )
    _fill(vit, _autoencoder(recipe))
    vit.set_grad_checkpointing(recipe.activation_checkpointing)
    for block in vit.blocks:
        cast(Attention, block.attn).backend = recipe.attention
        if recipe.compile_blocks:
            block.compile()
    return vit


def load_encoder(
    vit: VisionTransformer,
    recipe: EncoderRecipe,
    paths: Sequence[str | Path],
    expected: Sequence[str] = (),
) -> None:
    """Fill a ViT of `build_vit` with a pretrained encoder; its head stays as it is.

    Positions of another grid are interpolated.

    Args:
        paths: weights or runs as `mlomae.foreign` reads them.
        expected: globs of names that may be missing or left over.

    Raises:
        UserError: they cannot be read, hold no encoder, or do not fit; the ViT is unchanged.
    """
    autoencoder = _autoencoder(recipe)
    load_weights(autoencoder, paths, expected=expected, parts="encoder")
    _fill(vit, autoencoder)


def check_encoder(
    recipe: EncoderRecipe, paths: Sequence[str | Path], expected: Sequence[str] = ()
) -> None:
    """Raise as `load_encoder` would."""
    with torch.device("meta"):
        autoencoder = _autoencoder(recipe)
    check_weights(autoencoder, paths, expected=expected, parts="encoder")


def warn_of_other_pixels(recipe: RunRecipe) -> None:
    """Say when an encoder was trained on images that were normalised otherwise."""
    for path in recipe.init_from:
        config = read_config(path)
        for key in ("mean", "std"):
            ours = getattr(recipe.data, key)
            if key in config and tuple(config[key]) != ours:
                message = "%s was trained with %s %s, but data.%s is %s"
                log.warning(message, path, key, list(config[key]), key, list(ours))


def _autoencoder(recipe: EncoderRecipe) -> MaskedAutoencoder:
    """A masked autoencoder with the recipe's encoder, and with next to no decoder."""
    sizes = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "image_size"}
    return MaskedAutoencoder(
        **recipe.model_dump(include=sizes),
        decoder_embed_dim=4,
        decoder_depth=1,
        decoder_num_heads=1,
    )


def _fill(vit: VisionTransformer, autoencoder: MaskedAutoencoder) -> None:
    """Copy the encoder; without a final norm its norm is left out."""
    names = vit.state_dict()
    encoder = to_timm(autoencoder.state_dict())
    vit.load_state_dict({n: t for n, t in encoder.items() if n in names}, strict=False)
