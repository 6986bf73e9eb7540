"""The shipped recipes hold the published hyperparameters, written down here once more."""

import pytest
import torch

from mlomae.contrastive.program import HeadProgram, TuneProgram
from mlomae.contrastive.recipe import MaeCtRecipe
from mlomae.recipe import dump_recipe, load_recipe
from mlomae.training.vit import build_vit

# width, depth, patches, batch, pooling, lr of head and encoder
SIZES = {
    "base_patch16": (768, 12, 196, 1024, "avg", 8e-4),
    "large_patch16": (1024, 24, 196, 1024, "token", 8e-4),
    "huge_patch16": (1280, 32, 196, 512, "token", 4e-4),
    "huge_patch14": (1280, 32, 256, 512, "token", 4e-4),
}
# of the third step: epochs, temperature, top_k, target_ema_decay
TUNE = {
    "base_patch16": (20, 0.15, 20, 0.99),
    "large_patch16": (20, 0.2, 20, 0.99),
    "huge_patch16": (30, 0.3, 20, 0.995),
    "huge_patch14": (30, 0.3, 20, 0.995),
    "base_patch16_aug": (80, 0.15, 10, 0.99),
    "large_patch16_aug": (40, 0.15, 10, 0.99),
    "huge_patch16_aug": (40, 0.35, 20, 0.995),
    "huge_patch14_aug": (40, 0.35, 20, 0.995),
}


def load(name: str) -> MaeCtRecipe:
    size, aug, _ = name.partition("_aug")
    return load_recipe(f"mae_ct_vit_{size}_imagenet{aug}", MaeCtRecipe)


@pytest.mark.parametrize("name", TUNE)
def test_head_and_tune_are_the_published_ones(name: str) -> None:
    recipe = load(name)
    width, depth, num_patches, batch_size, pool, lr = SIZES[name.removesuffix("_aug")]
    model, head, tune = recipe.model, recipe.head, recipe.tune
    assert (model.embed_dim, model.depth, model.num_patches) == (width, depth, num_patches)
    assert model.global_pool == pool
    assert recipe.nnclr.queue_size == 65536 and recipe.nnclr.projection_dim == 256
    for level in (head, tune):
        assert (level.batch_size, level.betas, level.min_lr) == (batch_size, (0.9, 0.95), 0)
        assert level.warmup_epochs == pytest.approx(0.2 * level.epochs)
        assert level.lr == pytest.approx(lr) and not level.decay_norm_and_bias
    assert (head.epochs, head.temperature, head.top_k, head.weight_decay) == (20, 0.15, 1, 1e-5)
    assert (tune.epochs, tune.temperature, tune.top_k, tune.target_ema_decay) == TUNE[name]
    assert (tune.ema_decay, tune.layer_decay) == (0.9999, 0.65)
    assert (tune.weight_decay, tune.head_weight_decay) == (0.05, 1e-5)
    assert tune.head_lr == pytest.approx(5 * lr if name.endswith("_aug") else lr)
    assert recipe.tune_run().num_frozen_blocks == depth // 2


@pytest.mark.parametrize("name", TUNE)
def test_views_are_the_published_ones(name: str) -> None:
    recipe = load(name)
    for level in (recipe.head, recipe.tune):
        first = level.augmentation or recipe.data.augmentation
        second = level.second_augmentation or first
        for view, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
            assert (view.kind, view.scale, view.flip) == ("random_resized_crop", (0.08, 1.0), True)
            assert view.interpolation == "bicubic"
            if not name.endswith("_aug"):
                assert not view.build(224).changes_colours
                continue
            assert (view.color_jitter, view.color_jitter_prob) == ((0.4, 0.4, 0.2, 0.1), 0.8)
            assert (view.grayscale_prob, view.gaussian_blur_prob) == (0.2, blur)
            assert view.solarize_prob == solarize


@pytest.mark.parametrize("name", TUNE)
def test_pretraining_is_the_published_one(name: str) -> None:
    recipe = load(name)
    run = recipe.pretrain_run()
    if name.startswith("huge_patch14"):
        assert run is None and recipe.init_from
        return
    assert run is not None
    level, batch_size = run.pretrain, SIZES[name.removesuffix("_aug")][3]
    assert (run.epochs, level.warmup_epochs, level.num_views) == (800, 20, 2)
    assert (level.batch_size, level.lr) == (batch_size, pytest.approx(1.2e-3 * batch_size / 1024))
    assert level.augmentation is not None and level.augmentation.scale == (0.2, 1.0)
    assert not level.augmentation.build(224).changes_colours
    assert run.model.norm_pix_loss and run.masking.mask_ratio == 0.75


@pytest.mark.parametrize("name", ["base_patch16", "huge_patch14_aug"])
def test_steps_have_complete_recipes_and_networks_of_their_size(name: str, tmp_path) -> None:
    runs = load(name).runs()
    for step, run in runs.items():
        file = tmp_path / f"{step}.yaml"
        file.write_text(dump_recipe(run))
        assert load_recipe(file, type(run)) == run
    with torch.device("meta"):
        head = HeadProgram().module(runs["head"], "head")
        tuned = TuneProgram().module(runs["tune"], "tune")
        vit = build_vit(runs["tune"].model, fc_norm=False)
    upper = [*vit.blocks[len(vit.blocks) // 2 :].parameters(), *vit.norm.parameters()]
    expected = sum(p.numel() for p in (*upper, *head.parameters()))
    assert sum(p.numel() for p in tuned.parameters()) == expected
