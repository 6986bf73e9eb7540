"""Filling a model: what fits, what is interpolated, and the sentence about what does not fit."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlomae.errors import UserError
from mlomae.foreign import infer_architecture, load_weights, read_weights
from mlomae.foreign.layouts import to_hugging_face
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe
from tests.foreign import published
from tests.foreign.published import SIZES, tensors_of, to_tutorial

WIDTH, DEPTH, PATCH, DIM = 32, 2, 4, 16
TINY = {
    "image_size": 16,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 2,
    "decoder_embed_dim": DIM,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
NO_DECODER = ["decoder*", "mask_token"]


def tiny(**settings) -> MaskedAutoencoder:
    return MaskedAutoencoder(**TINY | settings)


def full(num_patches: int = 16) -> dict[str, Tensor]:
    return tensors_of(published.mae(WIDTH, DEPTH, PATCH, num_patches, DIM, 1), "cpu")


def encoder(num_patches: int = 16) -> dict[str, Tensor]:
    return tensors_of(published.mae_encoder(WIDTH, DEPTH, PATCH, num_patches), "cpu")


@pytest.fixture
def saved(tmp_path):
    """Write tensors to a file like MAE's."""

    def save(tensors: dict[str, Tensor], name: str = "w.pth"):
        torch.save({"model": tensors}, tmp_path / name)
        return tmp_path / name

    return save


def refusal(model: MaskedAutoencoder, *paths, **settings) -> str:
    """The error's sentence, once it is sure that nothing of the model has changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, paths, **settings)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what fits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_cast_to_the_models(dtype, saved):
    state = {name: tensor.to(dtype) for name, tensor in full().items()}
    model = tiny()
    loaded = load_weights(model, [saved(state)])
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].float()), name
    assert sorted(loaded.names) == sorted(state) and not loaded.missing and not loaded.interpolated


def test_positions_are_filled_fixed_or_trained(saved):
    file = saved(full())
    for trainable in (False, True):
        model = tiny(trainable_positions=trainable)
        load_weights(model, [file])
        assert torch.equal(model.pos_embed, full()["pos_embed"])
        assert model.pos_embed.requires_grad == trainable


def test_two_files_hold_the_model_together(saved):
    arguments = (WIDTH, DEPTH, PATCH, 16)
    parts = [
        saved(tensors_of(published.mae_ct_encoder(*arguments), "cpu"), "encoder.th"),
        saved(tensors_of(published.mae_ct_decoder(*arguments, DIM, 1), "cpu"), "decoder.th"),
    ]
    model = tiny()
    assert len(load_weights(model, parts).names) == len(model.state_dict())
    assert "decoder.th holds blocks.0" not in refusal(tiny(), parts[0])
    assert "encoder.th holds blocks.0.attn.proj.bias" in refusal(tiny(), parts[0], parts[0])


def test_an_encoder_alone_has_to_be_meant(saved):
    file, model = saved(encoder()), tiny()
    sentence = refusal(model, file)
    decoder = published.mae_decoder(WIDTH, PATCH, 16, DIM, 1)
    assert all(name in sentence for name in decoder) and "unexpected" not in sentence
    assert "--init_from_expected 'decoder*' --init_from_expected mask_token" in sentence

    untouched = model.decoder_pred.weight.clone()
    loaded = load_weights(model, [file], expected=NO_DECODER)
    assert sorted(loaded.missing) == sorted(decoder)
    assert torch.equal(model.decoder_pred.weight, untouched)
    assert torch.equal(model.blocks[1].attn.qkv.weight, encoder()["blocks.1.attn.qkv.weight"])


def test_an_evaluation_needs_no_decoder(saved):
    for state in (encoder(), full(), full() | {"decoder_pred.bias": torch.ones(7)}):
        model = tiny()
        untouched = model.decoder_pred.weight.clone()
        assert not load_weights(model, [saved(state)], parts="encoder").missing
        assert torch.equal(model.norm.weight, state["norm.weight"])
        assert torch.equal(model.decoder_pred.weight, untouched)


def test_a_fine_tuned_file_lacks_a_norm_and_has_a_head(saved):
    state = tensors_of(published.mae_fine_tuned(WIDTH, DEPTH, PATCH, 16), "cpu")
    sentence = refusal(tiny(), saved(state), parts="encoder")
    assert "missing: norm.weight, norm.bias; unexpected: fc_norm.weight, fc_norm.bias" in sentence
    assert "is a classifier on the mean of the patch tokens" in sentence
    expected = ["fc_norm*", "head*", "norm*"]
    loaded = load_weights(tiny(), [saved(state)], parts="encoder", expected=expected)
    assert len(loaded.unexpected) == 4


def test_of_the_tutorial_the_encoder_is_read(tmp_path, caplog):
    state = full()
    state["decoder_pos_embed"] = state["decoder_pos_embed"][:, 1:]
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    save_file(to_tutorial(state), folder / "model.safetensors")
    with caplog.at_level(logging.INFO, "mlomae"):
        weights = read_weights(tmp_path)
    assert weights.layout == "tutorial" and weights.tensors.keys() == encoder().keys()
    assert "only the encoder is read" in caplog.text
    assert "missing: mask_token" in refusal(tiny(), folder)


# --- architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_architecture_of_each_published_file(size, saved):
    width, depth, patch, num_patches = SIZES[size]
    known = {
        "image_size": 224,
        "patch_size": patch,
        "in_chans": 3,
        "embed_dim": width,
        "depth": depth,
        "num_heads": 12 if width == 768 else 16,
        "mlp_ratio": 4.0,
    }
    decoder = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    for shapes, expected in (
        (published.mae_encoder, known),
        (published.mae_ct_encoder, known),
        (published.mae, known | decoder),
        (published.hugging_face, known | decoder),
    ):
        state = tensors_of(shapes(width, depth, patch, num_patches))
        assert infer_architecture(read_weights(saved(state))) == expected
    assert infer_architecture(read_weights(saved(state)), image_size=448)["image_size"] == 448


def test_an_unusual_width_needs_the_config(tmp_path):
    save_file(to_hugging_face(full()), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"heads of an encoder of width 32: say --num_heads"):
        infer_architecture(read_weights(tmp_path))
    config = {"num_attention_heads": 2, "decoder_num_attention_heads": 2, "image_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    inferred = infer_architecture(read_weights(tmp_path))
    assert inferred == TINY | {"in_chans": 3, "mlp_ratio": 4.0}
    assert "set model.num_heads=2" in refusal(tiny(num_heads=4), tmp_path)
    assert "set model.decoder_num_heads=2" in refusal(tiny(decoder_num_heads=4), tmp_path)
    load_weights(tiny(decoder_num_heads=4), [tmp_path], parts="encoder")


def test_a_decoder_has_no_architecture_of_an_encoder(saved):
    file = saved(tensors_of(published.mae_ct_decoder(WIDTH, DEPTH, PATCH, 16, DIM, 1), "cpu"))
    with pytest.raises(UserError, match="holds no encoder: give the encoder's file"):
        infer_architecture(read_weights(file))


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key", "fix"),
    [
        (
            {"patch_size": 8, "image_size": 32},
            "patch_embed.proj.weight is [32, 3, 4, 4] there and [32, 3, 8, 8] in the model",
            "set model.patch_size=4, or",
        ),
        (
            {"embed_dim": 48},
            "blocks.1.norm1.weight is [32] there and [48] in the model",
            "set model.embed_dim=32, or",
        ),
        (
            {"decoder_embed_dim": 32},
            "mask_token is [1, 1, 16] there and [1, 1, 32] in the model",
            "set model.decoder_embed_dim=16, or",
        ),
        ({"depth": 3}, "missing: blocks.2.norm1.weight", "set model.depth=2, or"),
        ({"depth": 1}, "unexpected: blocks.1.norm1.weight", "set model.depth=2, or"),
        (
            {"decoder_depth": 2, "mlp_ratio": 2.0},
            "blocks.0.mlp.fc1.bias is [128] there and [64] in the model",
            "set model.decoder_depth=1, model.mlp_ratio=4, or",
        ),
    ],
)
def test_another_architecture(settings, key, fix, saved):
    sentence = refusal(tiny(**settings), saved(full()))
    assert "w.pth does not fit the model" in sentence and key in sentence
    assert f": {fix} give weights of the model's size" in sentence


def test_the_heads_of_a_published_width_are_named_and_watched(saved, caplog):
    state = {
        name: value if name.startswith(("decoder", "mask")) else torch.zeros(
            [192 if side == 32 else 6 * side if side in (96, 128) else side for side in value.shape]
        )
        for name, value in full().items()
    }  # fmt: skip
    sentence = refusal(tiny(), saved(state))
    assert "set model.embed_dim=192, model.num_heads=3, or" in sentence
    with pytest.raises(UserError):
        load_weights(tiny(embed_dim=192, num_heads=4), [saved(state)])
    assert (
        "does not tell its heads: published encoders 192 wide have 3, the model has 4"
        in caplog.text
    )


def test_images_of_another_number_of_channels_need_their_own_projection(saved):
    sentence = refusal(tiny(in_chans=1), saved(full()))
    assert "patch_embed.proj.weight is [32, 3, 4, 4] there and [32, 1, 4, 4] in the" in sentence
    assert "--init_from_expected 'patch_embed*'" in sentence


def test_a_misshapen_key_can_be_expected(saved):
    model, state = tiny(), full() | {"decoder_pred.bias": torch.ones(7)}
    untouched = model.decoder_pred.bias.clone()
    assert "--init_from_expected 'decoder*'" in refusal(model, saved(state))
    loaded = load_weights(model, [saved(state)], expected=["decoder_pred.*"])
    assert loaded.misshapen == ["decoder_pred.bias"]
    assert torch.equal(model.decoder_pred.bias, untouched)


def test_a_file_has_to_fill_something(saved):
    sentence = refusal(tiny(), saved({"patch_embed.proj.weight": torch.ones(1)}), expected=["*"])
    assert "w.pth fills nothing of the model" in sentence


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_refused(value, saved):
    state = full()
    state["blocks.1.mlp.fc2.bias"][3] = value
    sentence = refusal(tiny(), saved(state))
    assert "w.pth holds NaN or infinite values in blocks.1.mlp.fc2.bias: " in sentence


def test_integers_are_refused(saved):
    state = full()
    state["cls_token"] = state["cls_token"].to(torch.int8)
    assert "w.pth holds no real numbers in cls_token: give" in refusal(tiny(), saved(state))


@pytest.mark.parametrize(
    ("shapes", "name"),
    [(published.nnclr_head(768), "nnclr head"), (published.probe_head(768), "probe head")],
)
def test_a_head_is_no_part_of_the_model(shapes, name, saved):
    file = saved(tensors_of(shapes))
    assert read_weights(file).tensors.keys() == shapes.keys()
    assert f"w.pth holds a {name} and no part of the masked autoencoder" in refusal(tiny(), file)


def test_another_networks_weights(saved):
    with pytest.raises(UserError, match=r"w\.pth has none of the known layouts .*conv1\.weight"):
        read_weights(saved({"conv1.weight": torch.ones(1)}))


# --- positions of another grid -----------------------------------------------------------------


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(old: int, new: int) -> Tensor:
    """[new, old] weights of bicubic interpolation, pixel centres at halves, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for neighbour in range(int(centre // 1) - 1, int(centre // 1) + 3):
            weights[row, min(max(neighbour, 0), old - 1)] += cubic(centre - neighbour)
    return weights


@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 4), (6, 6)), ((4, 4), (2, 2)), ((4, 4), (3, 8)), ((4, 4), (2, 8)), ((2, 8), (4, 4))],
)
def test_positions_are_interpolated(old, new, tmp_path, caplog):
    """Also between grids of as many patches, whose tables have one shape."""
    state, model = full(), tiny(image_size=(new[0] * PATCH, new[1] * PATCH))
    save_file(state, tmp_path / "model.safetensors")
    config = {"image_size": [old[0] * PATCH, old[1] * PATCH]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, "mlomae"):
        loaded = load_weights(model, [tmp_path])
    assert loaded.interpolated == ["pos_embed", "decoder_pos_embed"]
    text = f"interpolated from a grid of {old[0]} x {old[1]} patches to {new[0]} x {new[1]}"
    assert text in caplog.text
    rows, columns = (resampling(*sides) for sides in zip(old, new, strict=True))
    for name in loaded.interpolated:
        before, after = state[name], model.state_dict()[name]
        grid = before[0, 1:].double().reshape(*old, -1)
        expected = torch.einsum("ri,cj,ijd->rcd", rows, columns, grid).flatten(0, 1)
        assert torch.equal(after[:, 0], before[:, 0])
        torch.testing.assert_close(after[0, 1:].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"image_size": [8, 32]}, None])
def test_an_oblong_grid_is_told_by_the_config(config, tmp_path):
    """16 patches are 4 x 4 unless a file beside them says that they are 2 x 8."""
    state = full()
    save_file(state, tmp_path / "model.safetensors")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = tiny(image_size=(8, 32))
    loaded = load_weights(model, [tmp_path])
    assert bool(loaded.interpolated) == (config is None)
    assert torch.equal(model.pos_embed, state["pos_embed"]) == (config is not None)


def test_a_run_tells_its_own_heads_and_grid(tmp_path):
    """Width 32 has no usual heads, and 16 patches look square: the recipe beside them knows."""
    architecture = TINY | {"image_size": "[8, 32]"}
    overrides = [f"model.{key}={value}" for key, value in architecture.items()]
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(
        dump_recipe(load_recipe("quickstart_mae", PretrainingRecipe, overrides))
    )
    save_file(full(), checkpoint / "model.safetensors")
    for path in (tmp_path, checkpoint):
        inferred = infer_architecture(read_weights(path))
        assert inferred == TINY | {"image_size": (8, 32), "in_chans": 3, "mlp_ratio": 4.0}
        assert not load_weights(MaskedAutoencoder(**inferred), [path]).interpolated


def test_a_number_of_patches_that_is_no_square(saved):
    state = full(num_patches=6)
    model = tiny(image_size=(8, 12))
    load_weights(model, [saved(state)])
    assert torch.equal(model.pos_embed, state["pos_embed"])
    assert "6 patches, which is no square: set model.image_size" in refusal(tiny(), saved(state))


def test_a_file_without_an_encoder_is_named_where_one_is_needed(saved):
    file = saved(tensors_of(published.mae_ct_decoder(WIDTH, DEPTH, PATCH, 16, DIM, 1), "cpu"))
    assert f"{file} holds no encoder: give the encoder" in refusal(tiny(), file, parts="encoder")
