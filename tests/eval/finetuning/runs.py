"""Tiny runs of fine-tuning: images, recipes with and without random draws, and their launches."""

from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from safetensors.torch import load_file

from data_ffcv.convert import convert
from eval import finetune
from eval.finetuning.recipe import FinetuneRecipe
from mlomae.recipe import load_recipe
from tests.runs import Setup, drive

NUM_CLASSES, NUM_IMAGES, NUM_TEST, NUM_STEPS = 6, 40, 13, 4
PROGRAM = "eval.finetune:FinetuningProgram"
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)

# nothing random after the initial weights
PLAIN: dict[str, Any] = {
    "method": "finetune",
    "epochs": 2,  # of two steps each
    "model": {
        **{"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        "attention": "math",
    },
    "data": {
        "num_classes": NUM_CLASSES,
        "mean": list(MEAN),
        "std": list(STD),
        "augmentation": {"kind": "center_crop", "flip": False},
    },
    "finetune": {
        **{"batch_size": 16, "lr": 0.01, "weight_decay": 0.05, "warmup_epochs": 0.5},
        **{"min_lr": 1e-4, "layer_decay": 0.65, "label_smoothing": 0.1, "ema_decay": 0.8},
    },
    "monitor": {"log_interval": 1, "eval_interval_epochs": 1},
}
# all that draws
RANDOM: dict[str, dict[str, Any]] = {
    "model": {"drop_path_rate": 0.4},
    "data": {
        "augmentation": {
            "kind": "random_resized_crop",
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing_prob": 0.5,
        }
    },
    "finetune": {"dropout": 0.2},
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}


def make_images(folder: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for number in range(count):
        home = folder / f"class{number % NUM_CLASSES}"
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    convert("imagefolder", folder, folder.with_suffix(".beton"))
    return folder.with_suffix(".beton")


class FinetuneSetup(Setup):
    """Adds the recipes `plain` and `random` to those of pretraining."""

    def __init__(self, folder: Path) -> None:
        train, test = make_images(folder / "train", NUM_IMAGES, 0), folder / "test"
        super().__init__(folder, train)
        files = {"train": str(train), "test": str(make_images(test, NUM_TEST, 1))}
        plain = deepcopy(PLAIN)
        plain["output_dir"] = str(folder / "run")
        plain["data"] |= files
        random = deepcopy(plain)
        for section, values in RANDOM.items():
            random[section] = random.get(section, {}) | values
        for name, values in (("plain", plain), ("random", random)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
            self.recipes[name] = str(folder / f"{name}.yaml")
        (folder / "evaluate.json").write_text("{}")

    def launch(self, run: str, *overrides: str, **more: Any) -> dict[str, Any]:
        return super().launch(run, *overrides, **{"program": PROGRAM, **more})

    def read(self, name: str) -> FinetuneRecipe:
        return load_recipe(self.recipes[name], FinetuneRecipe, [])


def last(run: Path) -> Path:
    """The checkpoint at the end of a run."""
    return run / "checkpoints" / f"step_{NUM_STEPS:08d}"


def train_and_evaluate(launches: list[Any], home: str) -> list[tuple[int, str]]:
    """Drive the launches; then evaluate one of the runs, and its weights as a file of others."""
    outcomes, folder = drive(launches), home
    file = Path(folder) / "mae_finetuned.pth"
    if dist.get_rank() == 0:
        torch.save({"model": load_file(last(Path(folder) / "plain") / "model.safetensors")}, file)
    dist.barrier()
    flags = ["--recipe", f"{folder}/plain.yaml", "--deepspeed_config", f"{folder}/evaluate.json"]
    with mock.patch("torch.distributed.destroy_process_group"):
        codes = [
            finetune.main([*flags, "--evaluate", f"{folder}/plain", f"output_dir={folder}/plain"]),
            finetune.main([*flags, "--evaluate", str(file), f"output_dir={folder}/foreign"]),
        ]
    return [*outcomes, *((code, "evaluate") for code in codes)]
