"""A small untrained run, somebody else's weights, and small image files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from data_ffcv.convert import convert
from mlomae.checkpoint.folders import MASKING_FILE
from mlomae.pretraining.networks import build_masking_network, build_model
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
OVERRIDES = [
    "model.image_size=16", "model.patch_size=4", "model.embed_dim=16", "model.depth=1",
    "model.decoder_embed_dim=16", "model.decoder_depth=1", "data.num_classes=3",
    "data.num_workers=1",
]  # fmt: skip


def make_beton(folder: Path, colours: dict, num_images: int, seed: int) -> Path:
    """Noisy images, each class of one colour, so that even random features tell them apart."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            pixels = np.clip(rng.normal(colour, 20, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    beton = folder.with_suffix(".beton")
    convert("imagefolder", folder, beton)
    return beton


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Files by name; the folder of each, of class folders, lies beside it."""
    folder = tmp_path_factory.mktemp("data")
    two = dict(list(COLOURS.items())[:2])
    renamed = {"red": (0, 0, 0), "green": (0, 0, 0), "violet": (0, 0, 0)}
    return {
        "train": str(make_beton(folder / "train", COLOURS, 20, 0)),
        "test": str(make_beton(folder / "test", COLOURS, 5, 1)),
        "two": str(make_beton(folder / "two", two, 2, 2)),
        "renamed": str(make_beton(folder / "renamed", renamed, 2, 2)),
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one checkpoint, whose weights are not those of the recipe's seed."""
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, OVERRIDES)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    other = load_recipe("quickstart_mlo_mae", PretrainingRecipe, [*OVERRIDES, "seed=1"])
    save_file(build_model(other).state_dict(), checkpoint / "model.safetensors")
    save_file(build_masking_network(other).state_dict(), checkpoint / MASKING_FILE)
    return tmp_path / "run"


@pytest.fixture
def foreign(run, tmp_path) -> Path:
    """The run's weights as somebody else would hand them on: without a recipe."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    weights = run / "checkpoints" / "step_00000007" / "model.safetensors"
    shutil.copy(weights, folder / "model.safetensors")
    heads = {"num_attention_heads": 4, "decoder_num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(heads))
    return folder
