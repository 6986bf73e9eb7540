"""Networks of a recipe, and weights in and out of a run's folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE, RECIPE_FILE, find_checkpoint
from mlomae.errors import UserError
from mlomae.pretraining.networks import (
    build_classifier,
    build_masking_network,
    build_model,
    load_masking_network,
    load_model,
)
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe

SMALL = [
    "model.image_size=16", "model.patch_size=4", "model.embed_dim=16", "model.depth=1",
    "model.num_heads=2", "model.decoder_embed_dim=16", "model.decoder_depth=1",
    "masking.hidden_dim=8",
]  # fmt: skip
BUILDERS = [build_model, build_masking_network, build_classifier]


def small(*overrides: str) -> PretrainingRecipe:
    return load_recipe("quickstart_mlo_mae", PretrainingRecipe, [*SMALL, *overrides])


def exported(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights as a checkpoint holds them: parameters first, then buffers; none as initialised."""
    torch.manual_seed(seed)
    parts = [*network.named_parameters(), *network.named_buffers()]
    return {name: torch.randn_like(value) for name, value in parts}


def save(
    run: Path, step: int, recipe: PretrainingRecipe, *, seed: int = 0, suffix: str = ""
) -> dict[str, Tensor]:
    """Write a checkpoint's weights and recipe; returns those of the model."""
    checkpoint = run / "checkpoints" / f"step_{step:08d}{suffix}"
    checkpoint.mkdir(parents=True)
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(recipe))
    weights = exported(build_model(recipe), seed)
    save_file(weights, checkpoint / MODEL_FILE)
    save_file(exported(build_masking_network(recipe), seed), checkpoint / MASKING_FILE)
    return weights


def is_same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(
        torch.equal(state[name], value) for name, value in weights.items()
    )


# --- building --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
def test_the_seed_of_the_recipe_decides_and_the_callers_draws_do_not(build):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(small("seed=5"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = build(small("seed=5")), build(small("seed=6"))
    assert is_same(same, one.state_dict())
    assert not is_same(other, one.state_dict())


def test_sizes_are_those_of_the_recipe():
    recipe = small(
        "model.norm_pix_loss=false", "model.trainable_positions=true", "masking.mask_ratio=0.5",
        "classifier.dropout=0.25", "data.num_classes=7",
    )  # fmt: skip
    model, network, head = (build(recipe) for build in BUILDERS)
    assert model.patch_embed.proj.weight.shape == (16, 3, 4, 4)
    assert (model.num_patches, model.num_keep, model.norm_pix_loss) == (16, 8, False)
    assert isinstance(model.pos_embed, nn.Parameter)
    assert network.fc1.weight.shape == (8, 16 * 16) and network.fc2.weight.shape == (16, 8)
    assert head.head.weight.shape == (7, 16) and head.dropout.p == 0.25


# --- reading ---------------------------------------------------------------------------------


def test_what_training_alone_needs_is_not_asked_for_again(tmp_path):
    recipe = small("model.attention=flash_attn", "masking.network=light", "masking.hidden_dim=8",
                   "model.compile_blocks=true")  # fmt: skip
    save(tmp_path, 7, recipe)
    model, read = load_model(tmp_path)
    network = load_masking_network(tmp_path)
    assert read == recipe  # as it was trained
    scores = network(model.embed(torch.zeros(2, 3, 16, 16)))
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 16) and scores.shape == (2, 16)
    assert model.blocks[0]._compiled_call_impl is None


@pytest.mark.parametrize("overrides", [[], ["model.trainable_positions=true"]])
def test_weights_come_back_to_the_bit(tmp_path, overrides):
    recipe = small(*overrides)
    weights = save(tmp_path, 7, recipe)
    model, read = load_model(tmp_path)
    assert is_same(model, weights) and not model.training
    assert read == recipe
    network = load_masking_network(tmp_path)
    assert is_same(network, exported(build_masking_network(recipe))) and not network.training


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    recipe = small()
    newest = [save(tmp_path, step, recipe, seed=step) for step in (2, 10, 9)][1]
    save(tmp_path, 11, recipe, seed=11, suffix=".tmp")
    (tmp_path / "checkpoints" / "step_00000012").mkdir()  # its weights are not there
    assert find_checkpoint(tmp_path).name == "step_00000010"
    assert is_same(load_model(tmp_path)[0], newest)
    older = tmp_path / "checkpoints" / "step_00000002"
    assert find_checkpoint(older) == older


def test_a_run_with_nothing_but_a_cut_short_checkpoint_has_none(tmp_path):
    save(tmp_path, 1, small(), suffix=".tmp")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)


def refusal(path: Path, load=load_model) -> str:
    """The one sentence with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        load(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_missing_folder_and_an_empty_one_are_refused(tmp_path):
    assert refusal(tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere is no folder: give")
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no complete checkpoint: train first")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.depth=2", "blocks.1."),
        ("model.decoder_depth=2", "decoder_blocks.1."),
        ("model.embed_dim=32", "size mismatch"),
        ("model.image_size=32", "pos_embed"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, override, named):
    save(tmp_path, 7, small())
    checkpoint = find_checkpoint(tmp_path)
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(small(override)))
    sentence = refusal(tmp_path)
    assert sentence.startswith(f"{checkpoint / MODEL_FILE} does not hold the weights of the recipe")
    assert named in sentence


@pytest.mark.parametrize("override", ["model.embed_dim=32", "masking.hidden_dim=4"])
def test_a_masking_network_of_another_recipe_is_refused(tmp_path, override):
    save(tmp_path, 7, small())
    checkpoint = find_checkpoint(tmp_path)
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(small(override)))
    sentence = refusal(tmp_path, load_masking_network)
    assert sentence.startswith(f"{checkpoint / MASKING_FILE} does not hold the weights")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    save(tmp_path, 7, small())
    for name, load in ((MODEL_FILE, load_model), (MASKING_FILE, load_masking_network)):
        file = find_checkpoint(tmp_path) / name
        file.write_bytes(file.read_bytes()[:size])
        assert refusal(tmp_path, load).startswith(f"{file} ")


def test_what_is_missing_in_a_checkpoint_is_named(tmp_path):
    save(tmp_path, 7, small())
    checkpoint = find_checkpoint(tmp_path)
    (checkpoint / MASKING_FILE).unlink()
    assert str(checkpoint / MASKING_FILE) in refusal(tmp_path, load_masking_network)
    (checkpoint / RECIPE_FILE).unlink()
    assert str(checkpoint / RECIPE_FILE) in refusal(tmp_path)
