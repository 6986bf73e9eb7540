"""Names of the same tensors in published files; ours are those of facebookresearch/mae.

Every function maps a dict of tensors to a new dict and leaves a name that it does not know as it
is, so that whoever loads the result can name it. Tensors are shared, not copied, where they keep
their shape; meta tensors work too.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

DECODER_NAMES = ("decoder_", "mask_token")  # how the names of our decoder's tensors begin

HUGGING_FACE = [  # ours, published name
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("blocks.", "vit.encoder.layer."),
    ("norm.", "vit.layernorm."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
]
HUGGING_FACE_BLOCK = [
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.query.", "attention.attention.query."),
    ("attn.key.", "attention.attention.key."),
    ("attn.value.", "attention.attention.value."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
]
# Transformers 5 holds other names in memory than it publishes, and writes the decoder's blocks
# under a third one; an encoder alone has no prefix.
HUGGING_FACE_SPELLINGS = [
    (re.compile(pattern), published)
    for pattern, published in [
        (r"^(embeddings\.|encoder\.layer\.|layers\.|layernorm\.)", r"vit.\1"),
        (r"^vit\.layers\.", "vit.encoder.layer."),
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ]
]
TUTORIAL = [  # PyTorch-Adventures; the misspelling is theirs
    ("cls_token", "encoder.enc_cls_token"),
    ("pos_embed", "encoder.enc_pos_embed"),
    ("patch_embed.", "encoder.patch_embed."),
    ("blocks.", "encoder.encoder_blocks."),
    ("norm.", "encoder.encoder_layer_norm."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_embed.", "decoder.encoder2decoder_embbedding_proj."),
    ("decoder_pos_embed", "decoder.dec_pos_embed"),
    ("decoder_blocks.", "decoder.decoder_blocks."),
    ("decoder_norm.", "decoder.decoder_layer_norm."),
    ("decoder_pred.", "embed2image."),
]
MAE_CT_DECODER = [
    ("mask_token", "mask_token"),
    ("decoder_embed.", "embed."),
    ("decoder_pos_embed", "pos_embed"),
    ("decoder_blocks.", "blocks."),
    ("decoder_norm.", "norm."),
    ("decoder_pred.", "pred."),
]


def detect_layout(tensors: State, num_patches: int | None = None) -> str:
    """Whose names these are.

    An MAE-CT encoder has the names of MAE's and only lacks the class row of the positions: it is
    recognised by a square number of rows. N + 1 is a square too on some oblong grids (15, 80,
    224), so a first row of zeros, which is MAE's class row, or a known number of patches overrules
    that.

    Args:
        tensors: names and tensors as in the file.
        num_patches: of the model that is about to be filled, if there is one.

    Returns:
        "mae" (also timm's encoders), "mae_ct_encoder", "mae_ct_decoder", "tutorial",
        "hugging_face", "probe_head", "nnclr_head", or "unknown".
    """
    names = set(tensors)
    if any("embeddings.cls_token" in n or "embeddings.patch_embeddings." in n for n in names):
        return "hugging_face"
    if "encoder.enc_cls_token" in names:
        return "tutorial"
    if "projector.0.weight" in names:
        return "nnclr_head"
    if {"embed.weight", "pred.weight", "mask_token"} <= names:
        return "mae_ct_decoder"
    if "patch_embed.proj.weight" in names:
        return "mae" if _has_class_row(tensors, num_patches) else "mae_ct_encoder"
    if any(re.fullmatch(r"layer\.\d\.(weight|running_mean)", name) for name in names):
        return "probe_head"
    return "unknown"


def _has_class_row(tensors: State, num_patches: int | None) -> bool:
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3 or "decoder_pos_embed" in tensors:
        return True
    rows = positions.shape[1]
    if num_patches is not None and rows in (num_patches, num_patches + 1):
        return rows == num_patches + 1
    if math.isqrt(rows) ** 2 != rows:
        return True
    return not positions.is_meta and not positions[0, 0].any()


# --- Hugging Face ------------------------------------------------------------------------------


def from_hugging_face(state: State) -> dict[str, Tensor]:
    """ViTMAE and ViT, in any of the spellings that are about, with or without a decoder."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in HUGGING_FACE_SPELLINGS:
            name = pattern.sub(replacement, name)
        published[name] = tensor
    back = [(theirs, ours) for ours, theirs in HUGGING_FACE]
    back_block = [(theirs, ours) for ours, theirs in HUGGING_FACE_BLOCK]
    return _join_qkv(_rename_blocks(rename(published, back), back_block))


def to_hugging_face(state: State) -> dict[str, Tensor]:
    """The published ViTMAE names, which every version of Transformers reads."""
    return rename(_rename_blocks(_split_qkv(state), HUGGING_FACE_BLOCK), HUGGING_FACE)


def _split_qkv(state: State) -> dict[str, Tensor]:
    """attn.qkv, rows q, k, v -> attn.query, attn.key, attn.value."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}.")] = rows
        else:
            split[name] = tensor
    return split


def _join_qkv(state: State) -> dict[str, Tensor]:
    """Inverse of `_split_qkv`; a query whose key or value is missing stays as it is."""
    joined = dict(state)
    for name in state:
        parts = [name.replace(".attn.query.", f".attn.{part}.") for part in ("key", "value")]
        if ".attn.query." in name and all(part in state for part in parts):
            joined[name.replace(".query.", ".qkv.")] = torch.cat([state[p] for p in (name, *parts)])
            for part in (name, *parts):
                del joined[part]
    return joined


# --- timm --------------------------------------------------------------------------------------


def to_timm(state: State) -> dict[str, Tensor]:
    """The encoder alone: timm's VisionTransformer has the same names.

    timm's own filter takes a file with `mask_token` for another model's, so the decoder must go.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(DECODER_NAMES)}


# --- MAE-CT ------------------------------------------------------------------------------------


def from_mae_ct_encoder(state: State) -> dict[str, Tensor]:
    """Prepend the row of zeros that the positions of MAE have for the class token."""
    return _with_class_row(state, "pos_embed")


def from_mae_ct_decoder(state: State) -> dict[str, Tensor]:
    """As the encoder's; that decoder gives its class token no position, hence the zeros.

    Older files have the row of zeros themselves.
    """
    renamed = rename(state, [(theirs, ours) for ours, theirs in MAE_CT_DECODER])
    positions = renamed.get("decoder_pos_embed")
    if positions is not None and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1:
        return renamed
    return _with_class_row(renamed, "decoder_pos_embed")


def _with_class_row(state: State, name: str) -> dict[str, Tensor]:
    """[1, N, D] -> [1, N + 1, D]."""
    if name not in state:
        return dict(state)
    positions = state[name]
    return {**state, name: torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


# --- tutorial ----------------------------------------------------------------------------------


def from_tutorial(state: State) -> dict[str, Tensor]:
    """Names alone: the decoder's positions [1, N, 512] stay without a class row.

    That decoder drops the class token before its blocks, which ours attends to: the same weights
    are another function, so `read_weights` takes the encoder alone.
    """
    return rename(state, [(theirs, ours) for ours, theirs in TUTORIAL])


# --- renaming ----------------------------------------------------------------------------------


def rename(state: State, table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace the beginning of each name by the first row of the table that fits it."""
    return {_replaced(name, table): tensor for name, tensor in state.items()}


def _rename_blocks(state: State, table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace what follows `blocks.<i>.` in our names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"(?:decoder_)?blocks\.\d+\.", name)
        start = block.end() if block else 0
        renamed[name[:start] + _replaced(name[start:], table) if block else name] = tensor
    return renamed


def _replaced(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        if name.startswith(old) if old.endswith(".") else name == old:
            return new + name[len(old) :]
    return name
