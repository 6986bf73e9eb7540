"""timm's ViT with our weights: the same features as the masked autoencoder's encoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlomae.errors import UserError
from mlomae.models import MaskedAutoencoder
from mlomae.recipe import EncoderRecipe
from mlomae.training.vit import build_vit, check_encoder, load_encoder

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4}
RECIPE = EncoderRecipe(image_size=16, patch_size=4, **SIZES)


def autoencoder(image_size: int = 16) -> MaskedAutoencoder:
    torch.manual_seed(3)
    small = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    model = MaskedAutoencoder(image_size=image_size, patch_size=4, **SIZES, **small).eval()
    for norm in (model.norm, *(block.norm1 for block in model.blocks)):
        torch.nn.init.normal_(norm.weight)  # ones would hide a norm that was not copied
    return model


def write(model: MaskedAutoencoder, folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(model.state_dict(), file)
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    return folder


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_are_those_of_the_masked_autoencoder(tmp_path, pool):
    model, recipe = autoencoder(), RECIPE.model_copy(update={"global_pool": pool})
    model.global_pool = pool
    vit = build_vit(recipe, fc_norm=False)
    load_encoder(vit, recipe, [write(model, tmp_path)])
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(vit.eval()(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_head_on_the_pooled_patches_has_a_fresh_norm_instead_of_the_encoders(tmp_path):
    recipe = RECIPE.model_copy(update={"global_pool": "avg"})
    vit = build_vit(recipe, num_classes=5)
    head = vit.head.weight.clone()
    load_encoder(vit, recipe, [write(autoencoder(), tmp_path)])
    assert torch.equal(vit.fc_norm.weight, torch.ones(32)) and torch.equal(vit.head.weight, head)
    assert not any(name.startswith("norm.") for name in vit.state_dict())


def test_positions_of_another_grid_are_interpolated_and_trained(tmp_path):
    vit = build_vit(RECIPE)
    load_encoder(vit, RECIPE, [write(autoencoder(image_size=32), tmp_path)])
    assert vit.pos_embed.shape == (1, 17, 32) and vit.pos_embed.requires_grad
    torch.testing.assert_close(vit.pos_embed[:, 0], autoencoder().pos_embed[:, 0])


def test_an_untrained_vit_has_maes_initial_values():
    vit = build_vit(RECIPE).requires_grad_(False)
    assert torch.equal(vit.pos_embed, autoencoder().pos_embed)
    assert float(vit.blocks[0].mlp.fc1.bias.abs().max()) == 0
    bound = (6 / (32 + 128)) ** 0.5  # Xavier
    assert 0.9 * bound < float(vit.blocks[1].mlp.fc1.weight.abs().max()) <= bound


def test_what_does_not_fit_is_refused_before_it_is_loaded(tmp_path):
    folder = write(autoencoder(), tmp_path)
    other = EncoderRecipe(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4)
    for refuse in (
        lambda: check_encoder(other, [folder]),
        lambda: load_encoder(build_vit(other), other, [folder]),
    ):
        with pytest.raises(UserError, match="does not fit the model"):
            refuse()


def test_the_recipes_kernel_drop_path_and_layer_scale_arrive():
    recipe = RECIPE.model_copy(update={"attention": "math", "drop_path_rate": 0.2})
    vit = build_vit(recipe, init_values=1.0)
    assert {block.attn.backend for block in vit.blocks} == {"math"}
    assert vit.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert torch.equal(vit.blocks[0].ls1.gamma, torch.ones(32))
