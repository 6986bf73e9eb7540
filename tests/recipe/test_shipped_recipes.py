"""The shipped recipes hold the published hyperparameters, written down here once more."""

import re
from pathlib import Path

import pytest
import torch

from mlomae.pretraining.networks import build_masking_network
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import differing_keys, load_recipe, read_values

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
METHOD_OF = {name: read_values(RECIPES / f"{name}.yaml").get("method") for name in SHIPPED}
PRETRAINING = [name for name, method in METHOD_OF.items() if method in ("mae", "mlo_mae")]

IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_NORM = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
# width, depth, heads, number of patches
SIZES = {
    "base_patch16": (768, 12, 12, 196),
    "large_patch16": (1024, 24, 16, 196),
    "huge_patch14": (1280, 32, 16, 256),
    "base_patch2": (768, 12, 12, 256),
}


IMAGENET = [f"vit_{size}_imagenet" for size in ("base_patch16", "large_patch16", "huge_patch14")]
CIFAR = ["vit_base_patch2_cifar10", "vit_base_patch2_cifar100"]
MLO_MAE_PUBLISHED = [f"mlo_mae_{name}" for name in IMAGENET + CIFAR]
MAE_PUBLISHED = [f"mae_{name}" for name in IMAGENET]
TWO_VIEWS = [f"mae_vit_{size}_patch16_imagenet_two_views" for size in ("base", "large")]
DOWNSTREAM = {  # task, classes
    "mlo_mae_vit_base_patch16_imagenet_cub200": ("classification", 200),
    "mlo_mae_vit_base_patch16_imagenet_ade20k": ("segmentation", 150),
    "mlo_mae_vit_tiny_camvid": ("segmentation", 11),
    "mlo_mae_vit_tiny_fashion_mnist_cifar10": ("classification", 10),
}
PROMISED = [
    *MLO_MAE_PUBLISHED,
    *MAE_PUBLISHED,
    *(f"mae_{name}" for name in CIFAR),
    *TWO_VIEWS,
    "mae_vit_base_patch16_imagenet_tutorial",
    "mlo_mae_continued_vit_base_patch16_imagenet",
    *DOWNSTREAM,
    "quickstart_mae",
    "quickstart_mlo_mae",
]


def test_every_promised_recipe_is_shipped():
    assert sorted(PROMISED) == PRETRAINING


@pytest.mark.parametrize("name", SHIPPED)
def test_header_of_a_shipped_recipe_says_how_to_run_it(name):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    header = text.partition("\nmethod:")[0]
    for entry in ("command ", "hardware ", "time ", "accuracy "):
        assert f"# {entry}" in header
    assert name in header
    for config in (word for word in header.split() if word.startswith("ds_configs/")):
        assert (RECIPES.parents[1] / config).is_file()


@pytest.mark.parametrize("name", [n for n in PRETRAINING if "vit" in n and "tiny" not in n])
def test_model_and_data_are_the_published_ones(name):
    recipe = load_recipe(name, PretrainingRecipe)
    size = next(size for size in SIZES if f"vit_{size}_" in name)
    model, data = recipe.model, recipe.data
    assert (model.embed_dim, model.depth, model.num_heads, model.num_patches) == SIZES[size]
    assert (model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads) == (512, 8, 16)
    assert model.mlp_ratio == 4 and model.norm_pix_loss == ("tutorial" not in name)
    assert recipe.masking.mask_ratio == 0.75
    assert recipe.masking.hidden_dim == 512
    assert (data.mean, data.std) == (CIFAR_NORM if "cifar" in name else IMAGENET_NORM)
    assert data.augmentation.flip
    if "cifar" in name:
        assert (data.augmentation.kind, data.augmentation.padding) == ("pad_crop", 4)
    else:
        assert data.augmentation.kind == "random_resized_crop"
        assert data.augmentation.scale == (0.2, 1.0)
        assert data.augmentation.interpolation == "bicubic"


B16 = "mlo_mae_vit_base_patch16_imagenet"
# MLO-MAE's published pretraining: passes of the encoder, batch, lr of the three levels
MLO_MAE = {
    "imagenet": (100, 256, 1.5e-4, 5e-4, 5e-5, 1000),
    "cifar10": (400, 128, 1e-4, 1e-3, 1e-3, 10),
    "cifar100": (400, 128, 1e-4, 1e-3, 1e-3, 100),
}


@pytest.mark.parametrize("name", MLO_MAE_PUBLISHED)
def test_mlo_mae_has_the_published_levels(name):
    recipe = load_recipe(name, PretrainingRecipe)
    epochs, batch_size, *lrs, num_classes = MLO_MAE[name.rpartition("_")[2]]
    assert recipe.epochs == epochs
    assert recipe.model.trainable_positions
    assert (recipe.data.num_classes, recipe.data.mask_fraction) == (num_classes, 0.2)
    assert list(recipe.levels) == ["pretrain", "classifier", "mask"]
    assert [level.lr for level in recipe.levels.values()] == lrs
    assert [level.steps_per_cycle for level in recipe.levels.values()] == [2, 1, 1]
    assert recipe.classifier is not None and recipe.classifier.dropout == 0.1
    for level in recipe.levels.values():
        assert (level.batch_size, level.optimizer) == (batch_size, "adamw")
        assert (level.betas, level.eps) == ((0.9, 0.95), 1e-8)
        assert (level.weight_decay, level.decay_norm_and_bias) == (0.01, True)
        assert (level.warmup_epochs, level.min_lr, level.gradient_clipping) == (0, 0, 0)


def test_cifar_makes_the_published_number_of_encoder_steps():
    # 200 named epochs of two steps per 128 of 40 000 images; the last batch of each is partial
    published = 125_200
    for method, num_images in (("mlo_mae", 40_000), ("mae", 50_000)):
        recipe = load_recipe(f"{method}_vit_base_patch2_cifar10", PretrainingRecipe)
        steps = recipe.epochs * num_images / recipe.pretrain.batch_size
        assert steps == pytest.approx(published, rel=2e-3)


def test_continued_pretraining_is_mlo_mae_from_weights():
    recipe = load_recipe("mlo_mae_continued_vit_base_patch16_imagenet", PretrainingRecipe)
    other = load_recipe(B16, PretrainingRecipe)
    assert recipe.init_from[0].name == "mae_pretrain_vit_base_full.pth"
    assert set(differing_keys(recipe, other)) == {"epochs", "init_from", "pretrain.warmup_epochs"}


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_labels_of_a_section_downstream(name):
    recipe = load_recipe(name, PretrainingRecipe)
    assert (recipe.labelled.task, recipe.labelled.num_classes) == DOWNSTREAM[name]
    assert recipe.downstream is not None
    if "imagenet" in name:
        keys = set(differing_keys(recipe, load_recipe(B16, PretrainingRecipe)))
        batches = {"classifier.batch_size", "mask.batch_size", "data.num_classes"}
        assert {key for key in keys if not key.startswith("downstream")} == batches


@pytest.mark.parametrize("name", MAE_PUBLISHED)
def test_mae_has_the_published_level(name):
    recipe = load_recipe(name, PretrainingRecipe)
    level = recipe.pretrain
    assert list(recipe.levels) == ["pretrain"]
    assert not recipe.model.trainable_positions
    assert (recipe.epochs, level.warmup_epochs, level.batch_size) == (800, 40, 4096)
    assert (level.base_lr, level.min_lr) == (1.5e-4, 0)
    assert level.lr == pytest.approx(2.4e-3)
    assert (level.optimizer, level.betas) == ("adamw", (0.9, 0.95))
    assert (level.weight_decay, level.decay_norm_and_bias) == (0.05, False)
    assert level.gradient_clipping == 0


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_two_views_are_the_first_step_of_mae_ct(name):
    recipe = load_recipe(name, PretrainingRecipe)
    level = recipe.pretrain
    assert (recipe.epochs, level.warmup_epochs) == (800, 20)
    assert (level.batch_size, level.num_views) == (1024, 2)
    assert level.lr == pytest.approx(1.2e-3)
    changed = {"epochs", "pretrain.warmup_epochs", "pretrain.batch_size", "pretrain.num_views"}
    one_view = load_recipe(name.removesuffix("_two_views"), PretrainingRecipe)
    assert set(differing_keys(recipe, one_view)) <= changed | {"pretrain.lr"}


def test_tutorial_has_the_tutorials_level():
    recipe = load_recipe("mae_vit_base_patch16_imagenet_tutorial", PretrainingRecipe)
    level = recipe.pretrain
    assert (recipe.epochs, level.warmup_epochs) == (800, 40)
    assert (level.batch_size, level.gradient_accumulation_steps) == (2048, 4)
    assert (level.lr, level.gradient_clipping) == (pytest.approx(1.2e-3), 1.0)
    assert recipe.model.trainable_positions and not recipe.model.norm_pix_loss


def test_quickstart_compares_equal_pretrain_levels():
    learned, random = (
        load_recipe("quickstart_mlo_mae", PretrainingRecipe),
        load_recipe("quickstart_mae", PretrainingRecipe),
    )
    keys = {key.split(".")[0] for key in differing_keys(learned, random)}
    assert keys <= {"method", "epochs", "data", "masking", "pretrain", "classifier", "mask"}
    assert learned.model == random.model
    same = random.pretrain.model_copy(update={"steps_per_cycle": learned.pretrain.steps_per_cycle})
    assert learned.pretrain == same
    # the first trains on 80 % of the 60 000 images
    assert learned.epochs * 48_000 == pytest.approx(random.epochs * 60_000)


@pytest.mark.parametrize("name", [n for n in PRETRAINING if n.startswith("mlo_mae")])
def test_the_light_network_is_light_in_every_recipe(name):
    recipe = load_recipe(name, PretrainingRecipe, ["masking.network=light"])
    with torch.device("meta"):
        network = build_masking_network(recipe)
    assert sum(p.numel() for p in network.parameters()) < 1_000_000


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md", "docs/results.md"])
def test_every_recipe_in_a_text_is_shipped(page):
    text = (RECIPES.parents[1] / page).read_text(encoding="utf-8")
    named = set(re.findall(r"--recipe ([a-z]\w+)", text)) | set(re.findall(r"`(knn_\w+)`", text))
    assert named and named <= set(SHIPPED)
