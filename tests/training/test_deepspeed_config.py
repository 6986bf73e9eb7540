"""DeepSpeed's JSON: completed for a level, refused where it contradicts the recipe."""

import json
from pathlib import Path

import pytest

from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training.deepspeed_config import (
    check_deepspeed_config,
    level_config,
    load_deepspeed_config,
)

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))


def recipe_with(*overrides: str) -> PretrainingRecipe:
    return load_recipe("quickstart_mlo_mae", PretrainingRecipe, overrides)


def complete(
    config: dict, recipe: PretrainingRecipe, world_size: int = 1, level: str = "pretrain"
) -> dict:
    return level_config(config, recipe.levels[level], level, world_size, "r.yaml", "d.json")


def refusal(config: dict, recipe: PretrainingRecipe, world_size: int = 1) -> str:
    """Return the one sentence with which a JSON is refused for a recipe."""
    with pytest.raises(UserError) as caught:
        check_deepspeed_config(config, recipe, world_size, "r.yaml", "d.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file_refusal(folder: Path, text: str) -> str:
    """Return the one sentence with which a JSON is refused by itself."""
    path = folder / "d.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_deepspeed_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_promised_config_is_shipped_and_listed():
    stages = [f"zero{stage}_bf16" for stage in range(4)]
    offloads = [f"zero{stage}_bf16_cpu_offload" for stage in (2, 3)]
    assert sorted([*stages, *offloads, "cpu_zero0_fp32", "cpu_zero2_fp32"]) == SHIPPED
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}.json` |" in readme for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_a_shipped_config_for_every_level(name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    base = load_deepspeed_config(CONFIGS / f"{name}.json")
    recipe = recipe_with("pretrain.gradient_clipping=2", "pretrain.gradient_accumulation_steps=4")
    check_deepspeed_config(base, recipe, 1, "r.yaml", name)
    for level_name, level in recipe.levels.items():
        parsed = DeepSpeedConfig(complete(base, recipe, level=level_name))
        assert parsed.zero_optimization_stage == int(name.partition("zero")[2][0])
        assert parsed.bfloat16_config.enabled == ("bf16" in name)
        assert not parsed.float16_config.enabled
        assert parsed.train_batch_size == level.batch_size
        steps = level.gradient_accumulation_steps
        assert parsed.gradient_accumulation_steps == steps
        assert parsed.train_micro_batch_size_per_gpu == level.batch_size // steps
        assert parsed.gradient_clipping == level.gradient_clipping
        assert parsed.zero_force_ds_cpu_optimizer != ("offload" in name)
        assert not parsed.wall_clock_breakdown


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_leaves_to_the_recipe_what_is_the_recipes(name):
    base = load_deepspeed_config(CONFIGS / f"{name}.json")
    decided = {"optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps"}
    decided |= {"train_batch_size", "train_micro_batch_size_per_gpu"}
    assert not decided & set(base)


def test_level_config_passes_the_rest_unchanged():
    base = {
        "zero_optimization": {"stage": 2},
        "anything": [1, {"else": None}],
        "gradient_clipping": 0,
    }
    recipe = recipe_with("pretrain.batch_size=96", "pretrain.gradient_accumulation_steps=3")
    config = complete(base, recipe, world_size=4)
    assert config == base | {
        "train_batch_size": 96,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
    }
    config["zero_optimization"]["stage"] = 3
    assert base["zero_optimization"] == {"stage": 2}


AGREEING = {
    "equal": {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 128,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01},
        },
    },
    "auto": {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    },
}
EQUAL_LEVELS = [
    f"{level}.{key}"
    for level in ("pretrain", "classifier", "mask")
    for key in ("batch_size=256", "lr=1e-3", "weight_decay=0.01")
]


@pytest.mark.parametrize("case", AGREEING)
def test_agreeing_config_passes_and_deepspeed_builds_no_optimizer(case):
    recipe = recipe_with(*EQUAL_LEVELS)
    check_deepspeed_config(AGREEING[case], recipe, 2, "r.yaml", "d.json")
    config = complete(AGREEING[case], recipe, world_size=2)
    assert config["train_micro_batch_size_per_gpu"] == 128
    assert "optimizer" not in config and "scheduler" not in config


# JSON -> key, its value, the recipe's value
CONTRADICTING = {
    "batch": ({"train_batch_size": 512}, "train_batch_size", "512", "256"),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 256}, "per_gpu", "256", "128"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "accumulation_steps", "2", "1"),
    "clipping": ({"gradient_clipping": 1.0}, "gradient_clipping", "1.0", "0.0"),
    "type": ({"optimizer": {"type": "Lamb"}}, "optimizer.type", "Lamb", "adamw"),
    "lr": ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr", "0.1", "0.001"),
    "betas": ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "betas", "0.999", "0.95"),
    "eps": ({"optimizer": {"params": {"eps": 1e-6}}}, "eps", "1e-06", "1e-08"),
    "decay": ({"optimizer": {"params": {"weight_decay": 0.2}}}, "weight_decay", "0.2", "0.01"),
    "other": ({"optimizer": {"params": {"bias_correction": False}}}, "bias_correction", "false"),
    "schedule": ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", "WarmupLR"),
    "text": ({"optimizer": "AdamW"}, "optimizer", "AdamW"),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_contradiction_is_refused_with_both_values(case):
    config, *parts = CONTRADICTING[case]
    sentence = refusal(config, recipe_with(*EQUAL_LEVELS), world_size=2)
    for part in (*parts, "d.json", "r.yaml", "remove it"):
        assert part in sentence


def test_every_level_is_compared():
    sentence = refusal({"train_batch_size": 256}, recipe_with(*EQUAL_LEVELS, "mask.batch_size=64"))
    assert "mask" in sentence and "64" in sentence


@pytest.mark.parametrize(
    ("batch_size", "world_size", "steps", "working"),
    [(100, 8, 1, 96), (101, 8, 1, 104), (3, 8, 1, 8), (100, 4, 8, 96)],
)
def test_batch_which_the_ranks_cannot_share_is_refused(batch_size, world_size, steps, working):
    overrides = [f"pretrain.batch_size={batch_size}"]
    overrides.append(f"pretrain.gradient_accumulation_steps={steps}")
    sentence = refusal({}, recipe_with(*overrides), world_size)
    for part in ("r.yaml", "pretrain.batch_size", f"{batch_size},", f"{world_size} ranks"):
        assert part in sentence
    assert sentence.endswith(f"use {working}")


UNSUPPORTED = {
    "fp16.enabled": {"fp16": {"enabled": True}},
    "torch_autocast.enabled": {"torch_autocast": {"enabled": True}},
    "managed_gradient_accumulation false": {"managed_gradient_accumulation": False},
    "offload_optimizer.device nvme": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    },
    "offload_param.device nvme": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}
    },
    "round_robin_gradients at stage 2": {
        "zero_optimization": {"stage": 2, "round_robin_gradients": True}
    },
    "parameter_alignment at stage 1": {
        "zero_optimization": {"stage": 1, "parameter_alignment": True}
    },
}


@pytest.mark.parametrize("recipe", ["quickstart_mae", "quickstart_mlo_mae"])
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_engines_cannot_do_exactly_is_refused(what, recipe):
    sentence = refusal(UNSUPPORTED[what], load_recipe(recipe, PretrainingRecipe))
    assert f"{what} is not supported yet: " in sentence
    assert "remove it" in sentence or "instead" in sentence


SUPPORTED = {
    "optimizer offload at stage 1": {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    },
    "optimizer offload at stage 2": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    },
    "parameter offload": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    "fp32 gradients": {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "orders at stage 3": {"zero_optimization": {"stage": 3, "round_robin_gradients": True}},
    "switched off": {"fp16": {"enabled": False}, "torch_autocast": {"enabled": False}},
}


@pytest.mark.parametrize("what", SUPPORTED)
def test_what_engines_can_do_is_accepted(what):
    check_deepspeed_config(SUPPORTED[what], recipe_with(), 1, "r.yaml", "d.json")


def test_sgd_under_zero_needs_deepspeeds_consent():
    recipe = recipe_with("classifier.optimizer=sgd")
    config = {"zero_optimization": {"stage": 1}}
    assert '"zero_allow_untested_optimizer": true' in refusal(config, recipe)
    check_deepspeed_config({}, recipe, 1, "r.yaml", "d.json")
    for name in SHIPPED:
        base = load_deepspeed_config(CONFIGS / f"{name}.json")
        check_deepspeed_config(base, recipe, 1, "r.yaml", name)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: use 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true"),
        ({"zero_optimization": True}, "zero_optimization is true, but must be an object"),
        ({"data_types": "fp32"}, 'data_types is "fp32", but must be an object'),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "remove one"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            'add "zero_force_ds_cpu_optimizer": false',
        ),
    ],
)
def test_config_which_cannot_work_is_refused(config, part, tmp_path):
    assert part in file_refusal(tmp_path, json.dumps(config))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1,}', "line 1"),
        ("", "line 1"),
        ("[]", "braces"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key c stands twice"),
    ],
)
def test_broken_json_is_refused(text, part, tmp_path):
    assert part in file_refusal(tmp_path, text)


def test_missing_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read .* give a JSON file"):
        load_deepspeed_config(tmp_path / "none.json")


def test_blocks_are_not_compiled_where_their_weights_come_and_go():
    recipe = recipe_with("model.compile_blocks=true")
    sentence = refusal({"zero_optimization": {"stage": 3}}, recipe)
    assert "r.yaml with d.json: model.compile_blocks" in sentence and "stage 0, 1 or 2" in sentence
    for stage in (0, 1, 2):
        check_deepspeed_config({"zero_optimization": {"stage": stage}}, recipe, 1, "r", "d")
