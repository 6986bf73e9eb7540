"""Tensors out of a weights file or folder, whoever wrote it, without running code from it."""

import json
import logging
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mlomae.checkpoint.folders import MODEL_FILE, RECIPE_FILE, find_checkpoint
from mlomae.errors import UserError
from mlomae.recipe import read_values

log = logging.getLogger(__name__)

INDEX = ".index.json"  # of a folder whose weights are spread over several files
PICKLE_FILE = "pytorch_model.bin"
FOLDER_FILES = (MODEL_FILE, MODEL_FILE + INDEX, PICKLE_FILE, PICKLE_FILE + INDEX)


def find_file(path: str | Path) -> Path:
    """The weights file meant by a path: itself, or the one in a folder.

    Folders are those of Hugging Face (also sharded) and timm, our runs and their checkpoints, and
    Accelerate's states: `checkpoint_<n>`, or the folder around them, which means the last.

    Raises:
        UserError: nothing is there, or no weights are in it.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a weights file, or a folder with one")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    if states := sorted(path.glob(f"checkpoint_*/{MODEL_FILE}"), key=_state_number):
        return states[-1]
    if any(path.glob("checkpoints")) or any(path.glob("*/checkpoints")):
        return find_checkpoint(path) / MODEL_FILE
    raise UserError(
        f"{path} holds no weights ({', '.join(FOLDER_FILES)}): give a weights file, a Hugging Face "
        "folder, or a run's output_dir or one of its checkpoints"
    )


def _state_number(file: Path) -> int:
    number = file.parent.name.removeprefix("checkpoint_")
    return int(number) if number.isdecimal() else -1


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a weights file or folder, on the CPU, under the names in the file.

    Wrappers (`model`, `state_dict`) and the prefix `module.` of data-parallel training are
    taken off. From a pickle only tensors and plain containers are read, and `argparse.Namespace`,
    which training checkpoints of MAE hold.

    Raises:
        UserError: the file cannot be read, holds code, or holds no weights.
    """
    file = find_file(path)
    if not file.name.endswith(INDEX):
        return _unwrapped(_read(file), file)
    shards = [_unwrapped(_read(shard), shard) for shard in _shards(file)]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    pairs = content.items() if isinstance(content, Mapping) else ()
    tensors = {n: t for n, t in pairs if isinstance(n, str) and isinstance(t, Tensor)}
    if not tensors:
        keys = f" (its keys: {', '.join(map(str, content))})" if isinstance(content, dict) else ""
        raise UserError(f"{file} holds no weights{keys}: give the file with the model's tensors")
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _shards(index: Path) -> list[Path]:
    where = _read_json(index).get("weight_map")
    names = {str(name) for name in where.values()} if isinstance(where, dict) else {""}
    shards = sorted(index.with_name(Path(name).name or "?") for name in names)
    for shard in shards:
        if shard.name.endswith(INDEX) or not shard.is_file():
            raise UserError(
                f"{index} names {shard.name}, which is not there: copy the whole folder"
            )
    return shards


def _read(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty: download or copy it again")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickles of others, which an error names
            # Mapped, the optimizer's tensors of a training checkpoint are never read.
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail in any step of its decoding
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    code = re.search(r"unsupported global:? (?:global )?([\w.]+)", str(error), re.IGNORECASE)
    if code:
        return UserError(
            f"{file} holds code or objects besides tensors ({code[1]}) and was not run: "
            "ask its author for the state_dict alone, as .safetensors or by torch.save"
        )
    return UserError(
        f"{file} is cut short, no weights file, or a pickle of other things than tensors, which is "
        f"not run ({type(error).__name__}): download or copy it again, or give a .pth, .th, .bin "
        "or .safetensors file"
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """What a file beside the weights tells and the tensors do not, in our words.

    Returns:
        Those of image_size, num_heads, decoder_num_heads, global_pool, mean, std and method that
        are known: from the JSON files of Hugging Face or timm, or from the recipe of a run.

    Raises:
        UserError: such a file is broken, or tells of another function than ours.
    """
    file = find_file(path)
    recipe, config = file.with_name(RECIPE_FILE), file.with_name("config.json")
    if recipe.is_file() and file.name == MODEL_FILE:
        return _of_recipe(read_values(recipe), recipe)
    if not config.is_file() or file.name not in FOLDER_FILES:
        return {}
    theirs = _read_json(config)
    if isinstance(theirs.get("pretrained_cfg"), dict):
        return _of_timm(theirs)
    return _of_hugging_face(theirs, config)


def _of_recipe(recipe: dict[str, Any], file: Path) -> dict[str, Any]:
    """What the recipe of a run of any kind says; runs save it complete."""
    try:
        model, data = recipe["model"], recipe["data"]
        config = {
            "method": recipe["method"],
            "mean": tuple(data["mean"]),
            "std": tuple(data["std"]),
            "num_heads": model["num_heads"],
            "global_pool": model["global_pool"],
            "image_size": tuple(model["image_size"]),
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the recipe that a run saves ({error!r}): copy the whole checkpoint"
        ) from None
    if "decoder_num_heads" in model:
        config["decoder_num_heads"] = model["decoder_num_heads"]
    return config


def _of_timm(theirs: dict[str, Any]) -> dict[str, Any]:
    cfg = theirs["pretrained_cfg"]
    size = cfg.get("input_size")  # [channels, height, width]
    config = {
        "image_size": size[1:] if isinstance(size, list) else None,
        "mean": cfg.get("mean"),
        "std": cfg.get("std"),
    }
    pool = theirs.get("global_pool")
    return _valid(config) | ({"global_pool": pool} if pool in ("token", "avg") else {})


def _of_hugging_face(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, ours in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if theirs.get(key, ours) != ours:
            raise UserError(
                f"{file} has {key} {theirs[key]}, but the encoder here has {ours}: "
                "give the weights of a ViT or ViTMAE with it"
            )
    if (eps := theirs.get("layer_norm_eps", 1e-6)) != 1e-6:
        log.info("%s: layer_norm_eps is %g there, and 1e-6 here as in MAE's code", file, eps)
    processor = file.with_name("preprocessor_config.json")
    images = _read_json(processor) if processor.is_file() else {}
    return _valid(
        {
            "image_size": theirs.get("image_size"),
            "num_heads": theirs.get("num_attention_heads"),
            "decoder_num_heads": theirs.get("decoder_num_attention_heads"),
            "mean": images.get("image_mean"),
            "std": images.get("image_std"),
        }
    )


def _valid(config: dict[str, Any]) -> dict[str, Any]:
    """What is a size, or three numbers for the channels."""
    sizes = {k: v for k, v in config.items() if k not in ("mean", "std") and _is_size(v)}
    channels = {k: config[k] for k in ("mean", "std") if _is_triple(config.get(k))}
    return sizes | {k: tuple(v) for k, v in channels.items()}


def _is_triple(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 3
    return is_list and all(isinstance(number, int | float) for number in value)


def _is_size(value: Any) -> bool:
    pair = value if isinstance(value, list) else [value, value]
    return len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): download or copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no JSON object: download or copy it again")
    return content
