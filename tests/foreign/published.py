"""The published files, from their description: names, shapes, and our tensors written so."""

import torch
from torch import Tensor

from mlomae.errors import UserError
from mlomae.foreign.layouts import (
    DECODER_NAMES,
    MAE_CT_DECODER,
    TUTORIAL,
    State,
    rename,
    to_timm,
)

Shapes = dict[str, tuple[int, ...]]

# width, depth, patch size, number of patches at 224 pixels
SIZES = {
    "B/16": (768, 12, 16, 196),
    "L/16": (1024, 24, 16, 196),
    "H/16": (1280, 32, 16, 196),
    "H/14": (1280, 32, 14, 256),
}


def tensors_of(
    shapes: Shapes, device: str = "meta", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors of these names and shapes, with normal values off the meta device."""
    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def both(name: str, rows: int, *columns: int) -> Shapes:
    """Weight and bias of a linear layer, or of a norm where there are no columns."""
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


def mae_blocks(prefix: str, depth: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= both(f"{prefix}.{i}.norm1", width)
        shapes |= both(f"{prefix}.{i}.attn.qkv", 3 * width, width)
        shapes |= both(f"{prefix}.{i}.attn.proj", width, width)
        shapes |= both(f"{prefix}.{i}.norm2", width)
        shapes |= both(f"{prefix}.{i}.mlp.fc1", 4 * width, width)
        shapes |= both(f"{prefix}.{i}.mlp.fc2", width, 4 * width)
    return shapes


def hugging_face_blocks(prefix: str, depth: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= both(f"{prefix}.{i}.layernorm_before", width)
        shapes |= both(f"{prefix}.{i}.attention.attention.query", width, width)
        shapes |= both(f"{prefix}.{i}.attention.attention.key", width, width)
        shapes |= both(f"{prefix}.{i}.attention.attention.value", width, width)
        shapes |= both(f"{prefix}.{i}.attention.output.dense", width, width)
        shapes |= both(f"{prefix}.{i}.layernorm_after", width)
        shapes |= both(f"{prefix}.{i}.intermediate.dense", 4 * width, width)
        shapes |= both(f"{prefix}.{i}.output.dense", width, 4 * width)
    return shapes


# Each takes: width, depth, patch size, number of patches; and width and depth of the decoder.


def mae_encoder(width: int, depth: int, patch: int, num_patches: int) -> Shapes:
    """mae_pretrain_vit_{base,large,huge}.pth, and timm's vit_*.mae."""
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, num_patches + 1, width),
        **both("patch_embed.proj", width, 3, patch, patch),
        **mae_blocks("blocks", depth, width),
        **both("norm", width),
    }


def mae_decoder(width: int, patch: int, num_patches: int, dim: int, depth: int) -> Shapes:
    return {
        "mask_token": (1, 1, dim),
        "decoder_pos_embed": (1, num_patches + 1, dim),
        **both("decoder_embed", dim, width),
        **mae_blocks("decoder_blocks", depth, dim),
        **both("decoder_norm", dim),
        **both("decoder_pred", patch * patch * 3, dim),
    }


def mae(
    width: int, depth: int, patch: int, num_patches: int, dim: int = 512, decoder_depth: int = 8
) -> Shapes:
    """mae_pretrain_vit_{base,large,huge}_full.pth and mae_visualize_*.pth."""
    encoder = mae_encoder(width, depth, patch, num_patches)
    return encoder | mae_decoder(width, patch, num_patches, dim, decoder_depth)


def mae_fine_tuned(width: int, depth: int, patch: int, num_patches: int) -> Shapes:
    """mae_finetuned_vit_{base,large,huge}.pth."""
    shapes = mae_encoder(width, depth, patch, num_patches)
    del shapes["norm.weight"], shapes["norm.bias"]
    return shapes | both("fc_norm", width) | both("head", 1000, width)


def mae_ct_encoder(width: int, depth: int, patch: int, num_patches: int) -> Shapes:
    """{mae_reimpl,maect,maectaug}_*.th."""
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, num_patches, width),
        **both("patch_embed.proj", width, 3, patch, patch),
        **mae_blocks("blocks", depth, width),
        **both("norm", width),
    }


def mae_ct_decoder(
    width: int, depth: int, patch: int, num_patches: int, dim: int = 512, decoder_depth: int = 8
) -> Shapes:
    return {
        "mask_token": (1, 1, dim),
        "pos_embed": (1, num_patches, dim),
        **both("embed", dim, width),
        **mae_blocks("blocks", decoder_depth, dim),
        **both("norm", dim),
        **both("pred", patch * patch * 3, dim),
    }


def tutorial(
    width: int, depth: int, patch: int, num_patches: int, dim: int = 512, decoder_depth: int = 8
) -> Shapes:
    return {
        "encoder.enc_cls_token": (1, 1, width),
        "encoder.enc_pos_embed": (1, num_patches + 1, width),
        **both("encoder.patch_embed.proj", width, 3, patch, patch),
        **mae_blocks("encoder.encoder_blocks", depth, width),
        **both("encoder.encoder_layer_norm", width),
        **both("decoder.encoder2decoder_embbedding_proj", dim, width),
        "decoder.mask_token": (1, 1, dim),
        "decoder.dec_pos_embed": (1, num_patches, dim),
        **mae_blocks("decoder.decoder_blocks", decoder_depth, dim),
        **both("decoder.decoder_layer_norm", dim),
        **both("embed2image", patch * patch * 3, dim),
    }


def hugging_face(
    width: int, depth: int, patch: int, num_patches: int, dim: int = 512, decoder_depth: int = 8
) -> Shapes:
    """facebook/vit-mae-{base,large,huge}."""
    return {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, num_patches + 1, width),
        **both("vit.embeddings.patch_embeddings.projection", width, 3, patch, patch),
        **hugging_face_blocks("vit.encoder.layer", depth, width),
        **both("vit.layernorm", width),
        "decoder.mask_token": (1, 1, dim),
        "decoder.decoder_pos_embed": (1, num_patches + 1, dim),
        **both("decoder.decoder_embed", dim, width),
        **hugging_face_blocks("decoder.decoder_layers", decoder_depth, dim),
        **both("decoder.decoder_norm", dim),
        **both("decoder.decoder_pred", patch * patch * 3, dim),
    }


def nnclr_head(width: int) -> Shapes:
    """Head of MAE-CT's third step."""

    def norm(name: str, dim: int) -> Shapes:
        running = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
        return both(name, dim) | running | {f"{name}.num_batches_tracked": ()}

    shapes: Shapes = {"queue": (64, 256), "queue_y": (64,), "queue_id": (64,), "queue_ptr": (1,)}
    for name in ("projector", "target_projector"):
        for index, rows, columns in ((0, 2048, width), (3, 2048, 2048), (6, 256, 2048)):
            shapes |= {
                f"{name}.{index}.weight": (rows, columns),
                **norm(f"{name}.{index + 1}", rows),
            }
    predictor = {"predictor.0.weight": (4096, 256), "predictor.3.weight": (256, 4096)}
    return shapes | predictor | norm("predictor.1", 4096)


def probe_head(width: int, first: int = 1) -> Shapes:
    """A linear probe of MAE-CT; the older layout has its first layer at 0."""
    shapes: Shapes = {}
    for norm in (f"layer.{first}", "norm"):
        running = {f"{norm}.running_mean": (width,), f"{norm}.running_var": (width,)}
        shapes |= running | {f"{norm}.num_batches_tracked": ()}
    return shapes | both(f"layer.{first + 1}", 1000, width)


# Our tensors under the names that these files have.


def to_mae_ct_encoder(state: State) -> dict[str, Tensor]:
    """The encoder without a class row: the row goes into the class token, where it always ends."""
    encoder = to_timm(state)
    positions = encoder["pos_embed"]
    encoder["cls_token"] = encoder["cls_token"] + positions[:, :1]
    encoder["pos_embed"] = positions[:, 1:]
    return encoder


def to_mae_ct_decoder(state: State) -> dict[str, Tensor]:
    """The decoder alone, without the class row of its positions.

    Raises:
        UserError: that row is not zero: there is nowhere else for it.
    """
    ours = {name: tensor for name, tensor in state.items() if name.startswith(DECODER_NAMES)}
    positions = ours["decoder_pos_embed"]
    if not positions.is_meta and positions[:, 0].any():
        raise UserError(
            "decoder_pos_embed gives the class token a position, which MAE-CT's decoder cannot "
            "hold: export a model with fixed positions (model.trainable_positions=false)"
        )
    ours["decoder_pos_embed"] = positions[:, 1:]
    return rename(ours, MAE_CT_DECODER)


def to_tutorial(state: State) -> dict[str, Tensor]:
    """Inverse of `from_tutorial`."""
    return rename(state, TUTORIAL)
