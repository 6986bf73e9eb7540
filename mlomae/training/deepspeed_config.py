"""DeepSpeed's JSON, completed for each level and checked against the recipe.

The JSON decides how training is spread over devices, the recipe decides what is trained. A
value which both hold and which differs is refused, so that neither wins silently.
"""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mlomae.errors import UserError
from mlomae.recipe import LevelRecipe, RunRecipe
from mlomae.recipe.section import flatten

_BF16 = ("bf16", "bfloat16")  # the second is the older name
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check what needs no recipe.

    Raises:
        UserError: The file cannot be read, is no JSON, or contradicts itself.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"DeepSpeed config {path} cannot be read ({error}): give a JSON file"
        ) from None
    try:
        config = json.loads(text, object_pairs_hook=_refuse_doubles)
    except ValueError as error:
        raise UserError(f"{path}: {error}, fix the JSON there") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, so put it into braces")
    try:
        _check_stage_and_precision(config)
    except _Problem as problem:
        raise UserError(f"{path}: {problem}") from None
    return config


def check_deepspeed_config(
    config: Mapping[str, Any],
    recipe: RunRecipe,
    world_size: int,
    recipe_name: str,
    config_name: str,
) -> None:
    """Refuse a JSON with which the recipe cannot be trained, for any of its levels.

    Args:
        config: What `load_deepspeed_config` returned.
        recipe: The recipe to train.
        world_size: Number of ranks.
        recipe_name: What an error calls the recipe.
        config_name: What an error calls the JSON.

    Raises:
        UserError: The two contradict each other, or the method does not support the JSON.
    """
    _check_readable(config, config_name)
    if recipe.model.compile_blocks and _stage(config) == 3:
        raise UserError(
            f"{recipe_name} with {config_name}: model.compile_blocks cannot be used at ZeRO stage "
            "3, whose gathering breaks each block into pieces that compile for minutes: switch it "
            "off, or use stage 0, 1 or 2"
        )
    for level_name, level in recipe.levels.items():
        level_config(config, level, level_name, world_size, recipe_name, config_name)


def level_config(
    base: Mapping[str, Any],
    level: LevelRecipe,
    level_name: str,
    world_size: int,
    recipe_name: str,
    config_name: str,
) -> dict[str, Any]:
    """Return the JSON with the batch sizes and the clipping of one level.

    All else passes unchanged, but for `optimizer` and `scheduler`: they agree with the recipe,
    which builds both, so DeepSpeed need not build them again.

    Args:
        base: What `load_deepspeed_config` returned.
        level: Batches and optimizer of the level.
        level_name: `pretrain`, `classifier` or `mask`.
        world_size: Number of ranks.
        recipe_name: What an error calls the recipe.
        config_name: What an error calls the JSON.

    Raises:
        UserError: The JSON contradicts the level, or the ranks cannot share its batch.
    """
    decided = {
        "train_batch_size": level.batch_size,
        "train_micro_batch_size_per_gpu": _micro_batch_size(
            level, level_name, world_size, recipe_name
        ),
        "gradient_accumulation_steps": level.gradient_accumulation_steps,
        "gradient_clipping": level.gradient_clipping,
    }
    _refuse_contradictions(
        base, decided | _optimizer_values(level), level_name, recipe_name, config_name
    )
    if level.optimizer == "sgd" and _stage(base) and not base.get("zero_allow_untested_optimizer"):
        raise UserError(
            f"{config_name}: DeepSpeed takes {level_name}.optimizer sgd of {recipe_name} with ZeRO "
            'only as an untested one: add "zero_allow_untested_optimizer": true'
        )
    passed = {key: value for key, value in base.items() if key not in _RECIPE_KEYS}
    return copy.deepcopy(passed) | decided


class _Problem(ValueError):
    """What is wrong inside a JSON; the caller adds its name."""


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, of which plain JSON silently keeps the last of two equal keys."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key} stands twice")
        values[key] = value
    return values


def _section(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the first of the named sections which the JSON holds, or an empty one."""
    for name in names:
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise _Problem(f"{name} is {json.dumps(section)}, but must be an object in braces")
        if section:
            return section
    return {}


def _stage(config: Mapping[str, Any]) -> Any:
    return _section(config, "zero_optimization").get("stage", 0)


def _is_enabled(config: Mapping[str, Any], *names: str) -> bool:
    return _section(config, *names).get("enabled") not in (None, False, "auto")


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The precision of forward and backward passes on the engines of a JSON."""
    return torch.bfloat16 if _is_enabled(config, *_BF16) else torch.float32


def _check_stage_and_precision(config: dict[str, Any]) -> None:
    for name in ("zero_optimization", *_BF16, "fp16", "torch_autocast", "data_types"):
        _section(config, name)
    stage = _stage(config)
    if type(stage) is not int or stage not in range(4):
        raise _Problem(f"zero_optimization.stage is {json.dumps(stage)}: use 0, 1, 2 or 3")
    if _is_enabled(config, *_BF16) and _is_enabled(config, "fp16"):
        raise _Problem("bf16.enabled and fp16.enabled are both true: remove one")
    offload = _section(_section(config, "zero_optimization"), "offload_optimizer")
    offloads = offload.get("device", "none") != "none"
    if offloads and config.get("zero_force_ds_cpu_optimizer") is not False:
        raise _Problem(
            "offload_optimizer is set, but the recipe's optimizer is PyTorch's: "
            'add "zero_force_ds_cpu_optimizer": false'
        )


def _check_readable(config: Mapping[str, Any], config_name: str) -> None:
    """Refuse engines that could not be trained, or whose gradients could not be read exactly.

    Plain MAE reads them, too: for the guard against bad steps and for the fp32 export.
    """
    for what, is_used, fix in _unsupported(config):
        if is_used:
            raise UserError(f"{config_name}: {what} is not supported yet: {fix}")


def _unsupported(config: Mapping[str, Any]) -> Iterable[tuple[str, bool, str]]:
    """What is unsupported, whether the JSON asks for it, and the fix."""
    # The guard would count the steps that DeepSpeed skips while it looks for a loss scale.
    yield "fp16.enabled", _is_enabled(config, "fp16"), "use bf16 instead"
    yield "torch_autocast.enabled", _is_enabled(config, "torch_autocast"), "use bf16 instead"
    unmanaged = config.get("managed_gradient_accumulation") is False
    yield "managed_gradient_accumulation false", unmanaged, "remove it"
    zero = _section(config, "zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        offloads_to_nvme = _section(zero, key).get("device") == "nvme"
        yield f"zero_optimization.{key}.device nvme", offloads_to_nvme, "use cpu instead"
    for key in ("round_robin_gradients", "parameter_alignment"):
        # DeepSpeed's own map from weights to shards leaves these out.
        is_used = _stage(config) in (1, 2) and bool(zero.get(key))
        yield f"zero_optimization.{key} at stage {_stage(config)}", is_used, "remove it"


def _micro_batch_size(
    level: LevelRecipe, level_name: str, world_size: int, recipe_name: str
) -> int:
    """Return the images per rank and accumulation step."""
    steps = level.gradient_accumulation_steps
    parts = world_size * steps
    if level.batch_size % parts:
        nearest = max(round(level.batch_size / parts), 1) * parts
        raise UserError(
            f"{recipe_name}: {level_name}.batch_size is {level.batch_size}, which {world_size} "
            f"ranks times {steps} gradient_accumulation_steps do not divide: use {nearest}"
        )
    return level.batch_size // parts


def _optimizer_values(level: LevelRecipe) -> dict[str, Any]:
    """Return the level's optimizer by the dotted keys of DeepSpeed's JSON."""
    values = {
        "optimizer.type": level.optimizer,
        "optimizer.params.lr": level.lr,
        "optimizer.params.weight_decay": level.weight_decay,
    }
    if level.optimizer == "sgd":
        return values | {"optimizer.params.momentum": level.momentum}
    betas = list(level.betas)
    return values | {"optimizer.params.betas": betas, "optimizer.params.eps": level.eps}


def _refuse_contradictions(
    base: Mapping[str, Any],
    decided: Mapping[str, Any],
    level_name: str,
    recipe_name: str,
    config_name: str,
) -> None:
    """Refuse a value of the JSON which the recipe decides otherwise."""
    fixed = {key: value for key, value in base.items() if key in _RECIPE_KEYS}
    for key, value in flatten(fixed):
        # "auto" is how configs of the Hugging Face trainer leave a value open
        if value in ("auto", {}):
            continue
        if key not in decided:
            raise UserError(
                f"{config_name}: {key} is {json.dumps(value)}, but {recipe_name} alone decides "
                f"how {level_name} is optimized and has no such key: remove it from the JSON"
            )
        if not _are_equal(value, decided[key]):
            raise UserError(
                f"{config_name}: {key} is {json.dumps(value)}, but {recipe_name} makes it "
                f"{json.dumps(decided[key])} for {level_name}: remove it from the JSON"
            )


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.lower() == b.lower()
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
