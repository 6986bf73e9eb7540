"""The shipped probes hold the published hyperparameters, written down here once more."""

import pytest

from eval.probing.recipe import NORM_EPS, ProbeRecipe
from mlomae.recipe import load_recipe
from tests.recipe.test_shipped_recipes import RECIPES

SHIPPED = sorted(path.stem for path in RECIPES.glob("linear_probe_*_imagenet.yaml"))
# width, depth, patch
SIZES = {
    "base_patch16": (768, 12, 16),
    "large_patch16": (1024, 24, 16),
    "huge_patch16": (1280, 32, 16),
    "huge_patch14": (1280, 32, 14),
}
TEN_RATES = tuple(i / 100 for i in range(10, 0, -1))


def test_every_promised_probe_is_shipped():
    published = ("base_patch16", "large_patch16", "huge_patch14")
    promised = [f"linear_probe_mae_vit_{size}_imagenet" for size in published]
    promised += [f"linear_probe_mae_ct_vit_{size}_imagenet" for size in SIZES]
    assert sorted([*promised, "linear_probe_held_out_vit_base_patch16_imagenet"]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_probe_is_the_published_one(name):
    recipe = load_recipe(name, ProbeRecipe)
    model, probe, augmentation = recipe.model, recipe.probe, recipe.data.augmentation
    size = next(size for size in SIZES if f"vit_{size}_" in name)
    assert (model.embed_dim, model.depth, model.patch_size) == SIZES[size]
    assert (augmentation.kind, augmentation.scale) == ("random_resized_crop", (0.08, 1.0))
    assert augmentation.flip and augmentation.interpolation == "bicubic"
    assert (probe.momentum, probe.weight_decay, probe.min_lr) == (0.9, 0, 0)
    assert (probe.schedule, recipe.monitor.eval_interval_epochs) == ("cosine", 1)
    if recipe.protocol == "mae":
        assert NORM_EPS["mae"] == 1e-6 and model.global_pool == "token"
        assert (recipe.epochs, probe.warmup_epochs) == (90 if "base" in name else 50, 10)
        assert (probe.optimizer, probe.batch_size, probe.lr) == ("lars", 16384, 6.4)
    else:
        assert NORM_EPS[recipe.protocol] == 1e-5
        assert (recipe.epochs, probe.warmup_epochs) == (50, 5)
        assert (probe.optimizer, probe.batch_size, probe.lr) == ("sgd", 1024, 0.4)
        assert probe.base_lrs == TEN_RATES
    if recipe.protocol == "mae_ct":
        assert model.global_pool == ("avg" if size == "base_patch16" else "token")


def test_held_out_trains_as_mae_ct():
    """Only the pooling differs: the published one depends on the encoder that is probed."""
    ours, theirs = (
        load_recipe(f"linear_probe_{protocol}_vit_base_patch16_imagenet", ProbeRecipe)
        for protocol in ("held_out", "mae_ct")
    )
    assert (ours.epochs, ours.probe) == (theirs.epochs, theirs.probe)
    assert ours.data == theirs.data
