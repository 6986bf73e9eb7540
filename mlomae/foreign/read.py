"""What a weights file holds: tensors under our names, and the architecture they are of."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mlomae.errors import UserError
from mlomae.foreign import layouts
from mlomae.foreign.files import find_file, read_config, read_tensors

log = logging.getLogger(__name__)

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published encoders, by width
DECODER_HEADS = 16  # of every published decoder
HEAD_LAYOUTS = ("probe_head", "nnclr_head")
TO_OURS = {
    "hugging_face": layouts.from_hugging_face,
    "mae_ct_encoder": layouts.from_mae_ct_encoder,
    "mae_ct_decoder": layouts.from_mae_ct_decoder,
    "tutorial": layouts.from_tutorial,
}


@dataclass
class PretrainedWeights:
    """What a file holds."""

    file: Path
    layout: str
    """As `detect_layout` tells it."""
    tensors: dict[str, Tensor]
    """Under our names; those of a head as in the file."""
    config: dict[str, Any]
    """As `read_config` tells it."""


def read_weights(path: str | Path, *, num_patches: int | None = None) -> PretrainedWeights:
    """Read a weights file or folder of any known layout.

    Args:
        path: as `find_file` takes it.
        num_patches: of the model to be filled; decides where the number of positions does not
            tell whether the first belongs to the class token.

    Raises:
        UserError: the file cannot be read, or its layout is not known.
    """
    file = find_file(path)
    tensors, config = read_tensors(file), read_config(file)
    layout = layouts.detect_layout(tensors, num_patches)
    if layout == "unknown":
        raise UserError(
            f"{file} has none of the known layouts (its first keys: {', '.join([*tensors][:3])}): "
            "give the weights of MAE, MAE-CT, Hugging Face ViTMAE or a timm ViT"
        )
    if layout in TO_OURS:
        tensors = TO_OURS[layout](tensors)
    if layout == "tutorial":
        # Without the class token the same decoder weights are another function.
        tensors = layouts.to_timm(tensors)
        log.info("%s: only the encoder is read, as its decoder drops the class token", file)
    return PretrainedWeights(file, layout, tensors, config)


def infer_architecture(
    weights: PretrainedWeights,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Arguments of `MaskedAutoencoder` that these weights fit.

    Args:
        weights: holding an encoder at least; without a decoder, ours keeps its default size.
        image_size: another than the weights were trained at, pixels.
        num_heads: of the encoder, where neither its width nor a file beside it tells.

    Raises:
        UserError: the tensors do not tell, or are not an encoder's.
    """
    tensors = weights.tensors
    if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.bias"} <= tensors.keys():
        raise UserError(f"{weights.file} holds no encoder: give the encoder's file")
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    return {
        "image_size": image_size or _image_size(weights, patch_size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": _count_blocks(tensors, "blocks"),
        "num_heads": num_heads or _num_heads(weights, embed_dim),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.bias"].shape[0] / embed_dim,
        **_decoder_architecture(weights),
    }


def _num_heads(weights: PretrainedWeights, embed_dim: int) -> int:
    """As the file beside the weights says, else that of the published encoder of this width."""
    num_heads: int | None = weights.config.get("num_heads")
    if num_heads:
        return num_heads
    if embed_dim not in HEADS:
        raise UserError(
            f"{weights.file} does not tell the number of heads of an encoder of width {embed_dim}: "
            "say --num_heads, or set model.num_heads in a recipe"
        )
    return HEADS[embed_dim]


def _decoder_architecture(weights: PretrainedWeights) -> dict[str, int]:
    tensors = weights.tensors
    if "decoder_embed.weight" not in tensors:
        return {}
    width = tensors["decoder_embed.weight"].shape[0]
    num_heads = weights.config.get("decoder_num_heads", DECODER_HEADS)
    if width % num_heads:
        raise UserError(
            f"{weights.file} does not tell the number of heads of a decoder of width {width}: "
            "set model.decoder_num_heads in a recipe, or give the folder with its config.json"
        )
    depth = _count_blocks(tensors, "decoder_blocks")
    return {"decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": num_heads}


def _count_blocks(names: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(f"{prefix}.")})


def _image_size(weights: PretrainedWeights, patch_size: int) -> int | tuple[int, int]:
    rows, columns = grid_size(weights, "pos_embed", patch_size)
    height, width = rows * patch_size, columns * patch_size
    return height if height == width else (height, width)


def grid_size(
    weights: PretrainedWeights, name: str, patch_size: int, default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns of the patches that the positions of this name, [1, 1 + N, D], are for.

    N alone does not tell them: a file beside the weights does, else they are taken for a square,
    as all published ones are, else for the default.

    Raises:
        UserError: none of these has N patches.
    """
    num_patches = weights.tensors[name].shape[1] - 1
    if size := weights.config.get("image_size"):
        height, width = (size, size) if isinstance(size, int) else size
        if (height // patch_size) * (width // patch_size) == num_patches:
            return height // patch_size, width // patch_size
    side = math.isqrt(num_patches)
    if side**2 == num_patches:
        return side, side
    if default is not None and math.prod(default) == num_patches:
        return default
    raise UserError(
        f"{weights.file} has {name} for {num_patches} patches, which is no square: "
        "set model.image_size to the height and width of its training"
    )
