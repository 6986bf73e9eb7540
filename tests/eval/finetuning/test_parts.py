"""What fine-tuning is made of: rates of layers, head, mixed labels, recipe, the crop of a test."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

from eval.finetuning import task as _finetune_task
from eval.finetuning.mixing import Mixer
from eval.finetuning.network import build_classifier, load_classifier, start
from eval.finetuning.recipe import FinetuneLevelRecipe, FinetuneRecipe, MixupRecipe
from eval.finetuning.task import Finetuning
from eval.finetuning.task import test_augmentation as crop_of_test
from mlomae.errors import UserError
from mlomae.recipe import dump_recipe, load_recipe
from mlomae.training.layer_decay import layer_decay_groups

VALUES: dict[str, Any] = {
    "method": "finetune",
    "output_dir": "run",
    "epochs": 2,
    "model": {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "data": {"train": "train", "test": "test", "num_classes": 6},
    "finetune": {"batch_size": 8, "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.65},
}


def recipe_with(**sections: Any) -> FinetuneRecipe:
    merged = {
        key: {**value, **sections.pop(key, {})} if isinstance(value, dict) else value
        for key, value in VALUES.items()
    }
    return FinetuneRecipe.model_validate(merged | sections)


# --- rates and weight decay of the layers ------------------------------------------------------


def layer_of(name: str, depth: int) -> int:
    """He et al.: 0 before the blocks, i + 1 in block i, L + 1 after them."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_every_weight_has_the_rate_and_decay_of_the_closed_form(global_pool: str) -> None:
    recipe = recipe_with(model={"global_pool": global_pool})
    vit = build_classifier(recipe)
    names = {id(param): name for name, param in vit.named_parameters()}
    seen = []
    for group in layer_decay_groups(vit, recipe.finetune, recipe.finetune.layer_decay):
        for param in group["params"]:
            name = names[id(param)]
            seen.append(name)
            assert group["lr_scale"] == pytest.approx(0.65 ** (3 + 1 - layer_of(name, 3)))
            is_free = param.ndim == 1 or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0 if is_free else 0.05), name
    assert sorted(seen) == sorted(names.values())
    norm = "fc_norm.weight" if global_pool == "avg" else "norm.weight"
    assert {norm, "head.weight", "head.bias"} <= set(seen)


# layers 0 and L + 1, and the first block of the upper half as the table of MAE-CT has it
TABLE = {
    "base": (768, 12, 12, 0.65**13, 0.075),
    "large": (1024, 24, 16, 0.65**25, 0.0057),
    "huge": (1280, 32, 16, 0.65**33, 0.0010),
}


@pytest.mark.parametrize("size", TABLE)
def test_published_sizes_have_the_published_rates(size: str) -> None:
    width, depth, heads, lowest, middle = TABLE[size]
    sizes = {"image_size": 32, "patch_size": 16, "embed_dim": width, "depth": depth}
    with torch.device("meta"):
        recipe = recipe_with(model={**sizes, "num_heads": heads})
        vit = build_classifier(recipe)
    scales = {
        id(param): group["lr_scale"]
        for group in layer_decay_groups(vit, recipe.finetune, recipe.finetune.layer_decay)
        for param in group["params"]
    }
    assert scales[id(vit.patch_embed.proj.weight)] == pytest.approx(lowest)
    assert scales[id(vit.blocks[depth // 2].attn.qkv.weight)] == pytest.approx(middle, rel=0.05)
    assert scales[id(vit.blocks[-1].mlp.fc2.bias)] == pytest.approx(0.65)
    assert scales[id(vit.head.weight)] == 1


def test_groups_are_timms_own_where_there_is_no_final_norm() -> None:
    """Where there is one they differ: timm counts it to the last block, and MAE does not."""
    recipe = recipe_with()
    vit = build_classifier(recipe)
    timms = param_groups_layer_decay(
        vit, weight_decay=0.05, layer_decay=0.65, no_weight_decay_list=vit.no_weight_decay()
    )

    def flat(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
        return {
            id(param): (group["lr_scale"], group["weight_decay"])
            for group in groups
            for param in group["params"]
        }

    ours = layer_decay_groups(vit, recipe.finetune, recipe.finetune.layer_decay)
    assert flat(ours) == flat(timms)


def test_everything_decays_where_the_recipe_asks_for_it() -> None:
    recipe = recipe_with(finetune={"decay_norm_and_bias": True})
    groups = layer_decay_groups(
        build_classifier(recipe), recipe.finetune, recipe.finetune.layer_decay
    )
    assert {group["weight_decay"] for group in groups} == {0.05}


# --- the head ----------------------------------------------------------------------------------


def test_head_starts_next_to_zero_and_by_the_seed() -> None:
    vit, again = build_classifier(recipe_with()), build_classifier(recipe_with())
    other = build_classifier(recipe_with(seed=1))
    weight = vit.head.weight
    assert weight.std().item() == pytest.approx(2e-5, rel=0.2) and not vit.head.bias.any()
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(weight, other.head.weight)


def test_pooling_leaves_out_the_class_token_and_has_its_own_norm() -> None:
    vit = build_classifier(recipe_with())
    assert isinstance(vit.norm, torch.nn.Identity)
    images = torch.randn(2, 3, 8, 8)
    tokens = vit.forward_features(images)
    pooled = F.layer_norm(tokens[:, 1:].mean(dim=1), (16,), eps=1e-6)
    torch.testing.assert_close(vit.forward_head(tokens, pre_logits=True), pooled)


@pytest.mark.parametrize("global_pool", ["avg", "token"])
def test_a_start_takes_the_encoder_and_leaves_the_head(tmp_path: Path, global_pool: str) -> None:
    """Of a file such as mae_finetuned_vit_base.pth; an evaluation takes the head as well."""
    settings = {"model": {"global_pool": global_pool}}
    theirs = build_classifier(recipe_with(seed=1, data={"num_classes": 9}, **settings))
    torch.nn.init.normal_(theirs.head.weight)
    torch.save({"model": theirs.state_dict()}, tmp_path / "finetuned.pth")
    recipe = recipe_with(init_from=[str(tmp_path / "finetuned.pth")], **settings)
    vit, fresh = build_classifier(recipe), build_classifier(recipe).state_dict()
    start(vit, recipe)
    for name, tensor in vit.state_dict().items():
        is_of_head = name.startswith(("fc_norm.", "head."))
        assert torch.equal(tensor, fresh[name] if is_of_head else theirs.state_dict()[name]), name

    same = recipe_with(data={"num_classes": 9}, **settings)
    whole = build_classifier(same)
    load_classifier(whole, same, tmp_path / "finetuned.pth")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(whole.eval()(images), theirs.eval()(images))


# --- mixing ------------------------------------------------------------------------------------


def numbered(count: int = 8, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose pixels all have the image's number, and as many classes."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 3, side, side).clone()
    return images, torch.arange(count)


def mixer(smoothing: float = 0.0, **keys: Any) -> Mixer:
    return Mixer(MixupRecipe(**keys), 8, smoothing, seed=3, rank=1)


@pytest.mark.parametrize("keys", [{"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {"mode": "elem"}])
def test_labels_have_the_shares_of_their_pixels(keys: dict[str, Any]) -> None:
    shares = set()
    for step in range(6):
        images, targets = mixer(**keys)(*numbered(), step)
        shown, partner = torch.arange(8.0), torch.arange(8.0).flip(0)
        # pixels are shown * share + partner * (1 - share), on average where a rectangle is pasted
        share = (images.mean(dim=(1, 2, 3)) - partner) / (shown - partner)
        expected = F.one_hot(shown.long(), 8) * share[:, None]
        expected = expected + F.one_hot(partner.long(), 8) * (1 - share[:, None])
        torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)
        shares |= {round(float(value), 4) for value in share}
    assert len(shares) > 3


def test_labels_are_smoothed_with_and_without_mixing() -> None:
    expected = torch.full((8, 8), 0.1 / 8) + 0.9 * torch.eye(8)
    for unmixed in (Mixer(None, 8, 0.1, seed=0, rank=0), mixer(0.1, prob=0.0)):
        images, targets = unmixed(*numbered(), 0)
        torch.testing.assert_close(targets, expected)
        assert torch.equal(images, numbered()[0])


def test_draws_depend_on_seed_step_and_rank_alone() -> None:
    first = mixer()(*numbered(), 7)
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    second = mixer()(*numbered(), 7)
    assert np.random.rand() == expected  # the global generator did not move
    assert all(map(torch.equal, first, second))
    for other in (Mixer(MixupRecipe(), 8, 0.0, seed=3, rank=0), mixer()):
        step = 7 if other.rank == 0 else 8
        assert not torch.equal(other(*numbered(), step)[1], first[1])


# --- the recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("finetune.layer_decay=1.5", "finetune.layer_decay"),
        ("finetune.layer_decy=0.5", "nearest valid key is finetune.layer_decay"),
        ("finetune.num_views=2", "finetune.num_views is 2, but fine-tuning has only one"),
        ("model.image_size=9", "model.image_size is 9, which patch_size 4 does not divide"),
        ("model.trainable_positions=false", "model.trainable_positions"),
        ("mixup={mixup_alpha: 0, cutmix_alpha: 0}", "mixup.mixup_alpha is 0 and so is cutmix"),
        ("finetune.warmup_epochs=2", "finetune.warmup_epochs is 2, but must be below epochs 2"),
        ("finetune.ema_decay=1", "finetune.ema_decay"),
        ("method=mae", "method is mae"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, override: str, sentence: str) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_with()))
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe, [override])
    assert str(refused.value).count("\n") == 0


def test_a_dumped_recipe_is_the_same(tmp_path: Path) -> None:
    recipe = recipe_with(mixup={"prob": 0.5}, finetune={"base_lr": 5e-4, "lr": 5e-4 * 8 / 256})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe, []) == recipe
    assert FinetuneLevelRecipe(batch_size=1024, base_lr=5e-4).lr == pytest.approx(2e-3)


# --- the crop of an evaluation -----------------------------------------------------------------


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (112, 128), (448, 448), (8, None)])
def test_larger_inputs_are_cut_without_a_margin(size: int, resize: int | None) -> None:
    recipe = recipe_with(model={"image_size": size})
    side = size if resize is None else 500

    class Info:
        min_height = max_height = min_width = max_width = side

    augmentation = crop_of_test(recipe, Info())
    assert (augmentation.kind, augmentation.height, augmentation.resize) == (
        "center_crop",
        size,
        resize,
    )


# --- evaluation of whole weights ---------------------------------------------------------------


def test_evaluates_the_given_weights_without_drawing_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_with()
    weights = build_classifier(recipe_with(seed=1)).state_dict()
    task = Finetuning.__new__(Finetuning)
    task.recipe, task.best, task.latest, task.cycles_per_epoch = recipe, {}, {}, 4.0
    task.test = task.device = None  # type: ignore[assignment]
    task.level = SimpleNamespace(num_steps_done=8, dtype=torch.float32)  # type: ignore[assignment]
    built, counted = [], []

    def build() -> torch.nn.Module:
        built.append(build_classifier(recipe))
        assert all(tensor.is_meta for tensor in built[0].state_dict().values())
        return built[0]

    def count(vit: torch.nn.Module, *_: Any) -> dict[str, float]:
        counted.append({name: tensor.clone() for name, tensor in vit.state_dict().items()})
        assert not any(tensor.is_meta for tensor in [*vit.parameters(), *vit.buffers()])
        return {"accuracy": 0.5, "loss": 1.0, "num_images": 3}

    task.build = build
    monkeypatch.setattr(_finetune_task, "count", count)
    assert task._count("test", weights) == {"test/accuracy": 0.5, "test/loss": 1.0}
    torch.testing.assert_close(counted[0], dict(weights), rtol=0, atol=0)
    assert task.best == {"test": (0.5, 2.0)} and task.latest == {"test": 0.5}
