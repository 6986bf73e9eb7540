"""Exported folders, each as the library that it is meant for reads it."""

import mlomae  # noqa: F401  fixes torchvision's import, which timm's needs

# isort: split
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mlomae.commands.export.formats as formats
from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE, RECIPE_FILE
from mlomae.commands.export.command import export
from mlomae.errors import UserError
from mlomae.foreign.layouts import to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.networks import build_masking_network, build_model, load_model
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe

SMALL = [
    "model.image_size=16", "model.patch_size=4", "model.embed_dim=16", "model.depth=2",
    "model.num_heads=2", "model.decoder_embed_dim=24", "model.decoder_depth=1",
    "model.decoder_num_heads=3", "masking.hidden_dim=8",
]  # fmt: skip
# two sizes, and every option that decides what the encoder computes
OTHER = [
    "model.image_size=12", "model.patch_size=2", "model.embed_dim=24", "model.depth=1",
    "model.num_heads=3", "model.decoder_depth=2", "model.mlp_ratio=3.0",
    "model.trainable_positions=true", "model.norm_pix_loss=true", "masking.mask_ratio=0.6",
]  # fmt: skip
OBLONG = ["model.image_size=[8, 24]", "model.global_pool=avg", "model.drop_path_rate=0.5"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PRECISIONS = list(TOLERANCE)


def save_run(run: Path, *overrides: str, step: int = 7) -> PretrainingRecipe:
    """Write a checkpoint's weights and recipe; all weights differ from their initial values."""
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, [*SMALL, *overrides])
    checkpoint = run / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(recipe))
    save_moved(build_model(recipe), checkpoint / MODEL_FILE, seed=step)
    save_moved(build_masking_network(recipe), checkpoint / MASKING_FILE, seed=step)
    return recipe


def save_moved(network: nn.Module, file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    noise = {name: torch.randn(v.shape, generator=generator) for name, v in state.items()}
    save_file({name: value + 0.1 * noise[name] for name, value in state.items()}, file)


def random_images(model: MaskedAutoencoder, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, model.in_chans, *model.image_size, generator=generator, dtype=dtype)


@torch.no_grad()
def assert_same_features(encoder: nn.Module, model: MaskedAutoencoder) -> None:
    """The whole token sequence and the pooled features, in both precisions."""
    for dtype, tolerance in TOLERANCE.items():
        encoder, model = encoder.to(dtype).eval(), model.to(dtype)
        images = random_images(model, dtype)
        for theirs, ours in (
            (encoder.forward_features(images), model.forward_features(images)),
            (encoder(images), model(images)),
        ):
            torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


def code_of(card: Path) -> str:
    """The Python of a model card."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return code


# --- timm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], OTHER, OBLONG], ids=["small", "other", "oblong"])
def test_timm_computes_the_same_features(tmp_path, overrides):
    save_run(tmp_path, *overrides)
    folder = export(tmp_path, "timm")
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same_features(encoder, load_model(tmp_path)[0])


def test_timms_own_architecture_loads_in_the_three_ways_that_the_card_names(tmp_path, monkeypatch):
    save_run(tmp_path, *sizes_of("vit_tiny", 16))
    folder = export(tmp_path, "timm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["model_args"]) == ("vit_tiny_patch16_224", {})
    name, file = config["architecture"], str(folder / MODEL_FILE)
    encoders = [
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": file}
        ),
        timm.create_model(name, checkpoint_path=file, num_classes=0),
    ]
    expected = load_file(folder / MODEL_FILE)
    assert all(is_same(encoder, expected) for encoder in encoders)
    assert all(m.eps == 1e-6 for m in encoders[0].modules() if isinstance(m, nn.LayerNorm))
    seen = record_created(monkeypatch)
    monkeypatch.chdir(folder)
    exec(code_of(folder / "README.md"), {})
    assert len(seen) == 3 and all(is_same(encoder, expected) for encoder in seen)


@pytest.mark.parametrize("overrides", [[], OTHER, OBLONG], ids=["small", "other", "oblong"])
def test_the_cards_three_ways_also_load_other_sizes(tmp_path, monkeypatch, overrides):
    recipe = save_run(tmp_path, *overrides)
    folder = export(tmp_path, "timm")
    seen = record_created(monkeypatch)
    monkeypatch.chdir(folder)
    exec(code_of(folder / "README.md"), {})
    model = load_model(tmp_path)[0]
    assert len(seen) == 3
    for encoder in seen:
        assert_same_features(encoder, model)
    for encoder in seen[:2]:  # the third way leaves timm's own description
        data = timm.data.resolve_model_data_config(encoder)
        assert tuple(data["mean"]) == recipe.data.mean
        assert tuple(data["std"]) == recipe.data.std
    data = timm.data.resolve_model_data_config(seen[0])
    assert data["input_size"] == (3, *recipe.model.image_size)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.875)


SIZES = {
    "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16),
}  # fmt: skip


def sizes_of(preset: str, patch_size: int, image_size: int = 224) -> list[str]:
    names = ("embed_dim", "depth", "num_heads")
    sizes = [f"model.{n}={s}" for n, s in zip(names, SIZES[preset], strict=True)]
    return [*sizes, f"model.patch_size={patch_size}", f"model.image_size={image_size}"]


@pytest.mark.parametrize(
    ("preset", "patch_size", "image_size", "architecture", "model_args"),
    [
        ("vit_tiny", 16, 224, "vit_tiny_patch16_224", {}),
        ("vit_small", 16, 224, "vit_small_patch16_224", {}),
        ("vit_base", 16, 224, "vit_base_patch16_224", {}),
        ("vit_large", 16, 224, "vit_large_patch16_224", {}),
        ("vit_huge", 14, 224, "vit_huge_patch14_224", {}),
        ("vit_huge", 16, 224, "vit_huge_patch14_224", {"patch_size": 16}),
        ("vit_base", 2, 32, "vit_base_patch16_224", {"patch_size": 2, "img_size": [32, 32]}),
    ],
)
def test_every_size_has_timms_names_and_shapes(
    preset, patch_size, image_size, architecture, model_args
):
    recipe = load_recipe(
        "quickstart_mlo_mae", PretrainingRecipe, [*SMALL, *sizes_of(preset, patch_size, image_size)]
    )
    with torch.device("meta"):
        ours = build_model(recipe)
        exported = formats.Exported(Path(), recipe, ours)
        assert formats.timm_architecture(exported) == (architecture, model_args)
        theirs = timm.create_model(architecture, num_classes=0, **model_args)
    assert shapes(theirs.state_dict()) == shapes(to_timm(ours.state_dict()))


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def is_same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(
        torch.equal(state[name], value) for name, value in weights.items()
    )


def record_created(monkeypatch) -> list[nn.Module]:
    """What timm.create_model returns from now on."""
    seen, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: seen.append(create(*a, **k)))
    return seen


# --- Transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], OTHER], ids=["small", "other"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_transformers_computes_the_same_loss_and_features(tmp_path, overrides, dtype):
    save_run(tmp_path, *overrides)
    folder = export(tmp_path, "hf")
    theirs, loading = transformers.ViTMAEForPreTraining.from_pretrained(
        folder, output_loading_info=True
    )
    assert problems(loading) == []
    model = load_model(tmp_path)[0].to(dtype)
    images, tolerance = random_images(model, dtype), TOLERANCE[dtype]
    noise = torch.rand(3, model.num_patches, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = theirs.to(dtype).eval()(images, noise=noise)
        ours = model(images, scorer=lambda embedding: noise.to(dtype))
    mask = ours["mask"]
    loss = (ours["patch_loss"] * mask).sum() / mask.sum()
    assert torch.equal(out.mask.to(dtype), mask)
    torch.testing.assert_close(out.logits, ours["prediction"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.loss, loss, rtol=tolerance, atol=tolerance)

    encoder, loading = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    decoder_only = [key for key in problems(loading) if not key.startswith("decoder.")]
    assert decoder_only == []
    with torch.no_grad():
        tokens = encoder.to(dtype).eval()(images).last_hidden_state
        features = model.forward_features(images)
    torch.testing.assert_close(tokens, features, rtol=tolerance, atol=tolerance)


def problems(loading: dict) -> list[str]:
    """Keys that a loading report names."""
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [str(name) for key in keys for name in loading.get(key, [])]


def test_the_published_names_are_written(tmp_path):
    save_run(tmp_path)
    names = load_file(export(tmp_path, "hf") / MODEL_FILE).keys()
    qkv = "vit.encoder.layer.1.attention.attention.query.weight"
    assert {qkv, "decoder.decoder_layers.0.attention.attention.key.bias"} <= names


def test_transformers_prepares_images_as_the_recipe_says(tmp_path):
    recipe = save_run(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(export(tmp_path, "hf"))
    size = recipe.model.image_size[0]
    images = torch.randint(256, (3, size, size), dtype=torch.uint8)
    (pixels,) = processor(images=images, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    torch.testing.assert_close(pixels, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_the_cards_lines_load_with_transformers(tmp_path, monkeypatch):
    save_run(tmp_path)
    folder = export(tmp_path, "hf")
    monkeypatch.chdir(folder)
    loaded = {}
    exec(code_of(folder / "README.md"), loaded)
    assert type(loaded["autoencoder"]) is transformers.ViTMAEForPreTraining
    assert type(loaded["encoder"]) is transformers.ViTModel and loaded["encoder"].pooler is None


def test_transformers_cannot_hold_oblong_images(tmp_path):
    save_run(tmp_path, *OBLONG)
    with pytest.raises(UserError, match=r"^model.image_size is \[8, 24\], but ViTMAE in Transf"):
        export(tmp_path, "hf")
    assert not (tmp_path / "export").exists()


# --- our names and ONNX ------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "light"])
def test_safetensors_hold_both_networks(tmp_path, monkeypatch, network):
    save_run(tmp_path, f"masking.network={network}")
    folder = export(tmp_path, "safetensors")
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    monkeypatch.chdir(folder)
    loaded = {}
    exec(code_of(folder / "README.md"), loaded)
    for part, name in (("autoencoder", MODEL_FILE), ("masking_network", MASKING_FILE)):
        expected = load_file(checkpoint / name)
        assert loaded[part].keys() == expected.keys()
        assert all(torch.equal(loaded[part][key], value) for key, value in expected.items())


def test_plain_mae_has_no_masking_network(tmp_path):
    save_mae_run(tmp_path)
    folder = export(tmp_path, "safetensors")
    assert not (folder / MASKING_FILE).exists()
    assert "Labels" not in (folder / "README.md").read_text()


def save_mae_run(run: Path, *overrides: str) -> PretrainingRecipe:
    """As `save_run`, of plain MAE."""
    save_run(run)
    checkpoint = run / "checkpoints" / "step_00000007"
    (checkpoint / MASKING_FILE).unlink()
    sizes = [key for key in SMALL if not key.startswith("masking")]
    recipe = load_recipe("quickstart_mae", PretrainingRecipe, [*sizes, *overrides])
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(recipe))
    return recipe


@pytest.mark.parametrize("pool", ["token", pytest.param("avg", marks=pytest.mark.slow)])
def test_onnx_computes_the_same_features_for_any_batch(tmp_path, pool):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    compiled = ["model.compile_blocks=true", "model.activation_checkpointing=true"]
    sizes = ["model.image_size=[4, 8]", "model.depth=1", "masking.mask_ratio=0.5"]
    save_run(tmp_path, *sizes, f"model.global_pool={pool}", *compiled)
    folder = export(tmp_path, "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    checkpoint = load_file(tmp_path / "checkpoints" / "step_00000007" / MODEL_FILE)
    reference = timm.create_model(
        "vit_base_patch16_224", img_size=(4, 8), patch_size=4, embed_dim=16, depth=1, num_heads=2,
        num_classes=0, global_pool=pool, fc_norm=False,
    ).eval()  # fmt: skip
    reference.load_state_dict(to_timm(checkpoint))
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 4, 8)
        (features,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(features), reference(images), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch, value):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session:
        def __init__(self, file: Path, providers: list[str]) -> None:
            pass

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(inputs["images"]), 16), value, np.float32)]

    save_run(tmp_path)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(UserError, match=r"^onnxruntime's features differ from PyTorch's by"):
        export(tmp_path, "onnx")
    assert list((tmp_path / "export").iterdir()) == []


def test_onnx_names_what_to_install(tmp_path, monkeypatch):
    save_run(tmp_path)
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"pip install 'mlomae\[onnx\]'"):
        export(tmp_path, "onnx")
