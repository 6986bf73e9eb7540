"""The weights of an exported folder, in each format with the description its library reads."""

import json
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE, save_tensors
from mlomae.errors import UserError
from mlomae.foreign.layouts import to_hugging_face, to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.networks import build_model, load_masking_network
from mlomae.pretraining.recipe import PretrainingRecipe

ONNX_FILE = "model.onnx"
TIMM_MODELS = {  # embed_dim, depth, num_heads, patch_size
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}
CROP_SHARE = 224 / 256
"""Side of the evaluation's crop over that of the resized image, as in all MAE results."""


@dataclass(frozen=True)
class Exported:
    """What is exported."""

    checkpoint: Path
    recipe: PretrainingRecipe
    model: MaskedAutoencoder


def check_format(format: str, recipe: PretrainingRecipe) -> None:
    """Refuse what a format cannot hold, before any weights are read.

    Raises:
        UserError: names the key or the package, and the fix.
    """
    if format == "onnx" and not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UserError(
            "--format onnx needs onnx, onnxscript and onnxruntime: pip install 'mlomae[onnx]'"
        )
    height, width = recipe.model.image_size
    if format == "hf" and height != width:
        raise UserError(
            f"model.image_size is {[height, width]}, but ViTMAE in Transformers takes square "
            "images only: use --format timm, safetensors or onnx"
        )


# --- timm --------------------------------------------------------------------------------------


def write_timm(exported: Exported, folder: Path) -> None:
    """The encoder and its description, as `timm.create_model("local-dir:...")` reads them."""
    save_tensors(to_timm(exported.model.state_dict()), folder / MODEL_FILE)
    _write_json(folder / "config.json", timm_config(exported))


def timm_config(exported: Exported) -> dict[str, Any]:
    """timm's configuration format."""
    model, data = exported.model, exported.recipe.data
    architecture, model_args = timm_architecture(exported)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.embed_dim,
        "global_pool": model.global_pool,
        "model_args": model_args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [model.in_chans, *model.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(data.mean),
            "std": list(data.std),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "custom_load": False,
        },
    }


def timm_architecture(exported: Exported) -> tuple[str, dict[str, Any]]:
    """timm's name of the encoder, and the arguments in which this one differs from it."""
    model, mlp_ratio = exported.model, exported.recipe.model.mlp_ratio
    sizes = (model.embed_dim, model.depth, model.num_heads, model.patch_size)
    same_but_patches = [known for known in TIMM_MODELS if known[:3] == sizes[:3]]
    base = sizes if sizes in TIMM_MODELS else (*same_but_patches, (768, 12, 12, 16))[0]
    names = ("embed_dim", "depth", "num_heads", "patch_size")
    arguments: dict[str, Any] = {
        name: size for name, size, known in zip(names, sizes, base, strict=True) if size != known
    }
    if mlp_ratio != 4:
        arguments["mlp_ratio"] = mlp_ratio
    if model.in_chans != 3:
        arguments["in_chans"] = model.in_chans
    if model.image_size != (224, 224):
        arguments["img_size"] = list(model.image_size)
    if model.global_pool == "avg":  # ours normalises before the mean, timm's default after it
        arguments |= {"global_pool": "avg", "fc_norm": False}
    return TIMM_MODELS[base], arguments


# --- Transformers ------------------------------------------------------------------------------


def write_hf(exported: Exported, folder: Path) -> None:
    """The whole autoencoder as ViTMAE, under the published names."""
    save_tensors(to_hugging_face(exported.model.state_dict()), folder / MODEL_FILE)
    _write_json(folder / "config.json", hf_config(exported))
    data, (height, width) = exported.recipe.data, exported.model.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic, in Pillow's numbering
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }
    _write_json(folder / "preprocessor_config.json", processor)


def hf_config(exported: Exported) -> dict[str, Any]:
    """ViTMAEConfig; its encoder's part is also a ViTConfig."""
    model, recipe = exported.model, exported.recipe.model
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": model.image_size[0],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": int(model.embed_dim * recipe.mlp_ratio),
        "decoder_hidden_size": recipe.decoder_embed_dim,
        "decoder_num_hidden_layers": recipe.decoder_depth,
        "decoder_num_attention_heads": recipe.decoder_num_heads,
        "decoder_intermediate_size": int(recipe.decoder_embed_dim * recipe.mlp_ratio),
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# --- our names ---------------------------------------------------------------------------------


def write_safetensors(exported: Exported, folder: Path) -> None:
    """The autoencoder under the names of facebookresearch/mae, and a learned masking network."""
    save_tensors(exported.model.state_dict(), folder / MODEL_FILE)
    if exported.recipe.method == "mlo_mae":
        save_tensors(load_masking_network(exported.checkpoint).state_dict(), folder / MASKING_FILE)


# --- ONNX --------------------------------------------------------------------------------------


def write_onnx(exported: Exported, folder: Path) -> None:
    """Features of whole images, for batches of any size, compared with onnxruntime.

    Raises:
        UserError: onnxruntime computes something else.
    """
    encoder = _plain_copy(exported)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, about its insides
        torch.onnx.export(
            encoder,
            (_random_images(encoder, 2),),  # not 1, which would be taken for a constant
            folder / ONNX_FILE,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    _compare(encoder, folder / ONNX_FILE)


def _plain_copy(exported: Exported) -> MaskedAutoencoder:
    """The same weights without what only training needs: a graph of plain operations."""
    plain = {"attention": "math", "activation_checkpointing": False, "compile_blocks": False}
    recipe = exported.recipe
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=plain)})
    encoder = build_model(recipe).eval()
    encoder.load_state_dict(exported.model.state_dict())
    return encoder


@torch.no_grad()
def _compare(encoder: MaskedAutoencoder, file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch_size in (1, 3):
        images = _random_images(encoder, batch_size)
        expected = encoder(images)
        (features,) = session.run(None, {"images": images.numpy()})
        difference = (torch.from_numpy(features) - expected).abs().max() / expected.abs().max()
        if not difference < 1e-4:  # NaN included
            raise UserError(
                f"onnxruntime's features differ from PyTorch's by {difference:.1g} of the largest "
                "one: use other versions of onnx and onnxruntime, or another --format"
            )


def _random_images(encoder: MaskedAutoencoder, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randn(batch_size, encoder.in_chans, *encoder.image_size, generator=generator)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
