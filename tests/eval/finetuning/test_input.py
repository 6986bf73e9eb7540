"""What fine-tuning refuses before any work, in one sentence that names the fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from data_ffcv.convert import convert
from eval import finetune
from eval.finetuning import evaluate
from eval.finetuning.network import build_classifier
from eval.finetuning.recipe import FinetuneRecipe
from mlomae.recipe import load_recipe
from mlomae.training import command_line

RECIPE: dict[str, Any] = {
    "method": "finetune",
    "epochs": 1,
    "model": {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "finetune": {"batch_size": 4, "lr": 1e-3},
}


def make_images(folder: Path, classes: str, count: int) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def make_masks(folder: Path) -> Path:
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        (folder / kind / "train").mkdir(parents=True)
        for number in range(4):
            Image.new(mode, (8, 8)).save(folder / kind / "train" / f"{number}.png")
    convert("segmentation", folder, folder.with_suffix(".beton"))
    return folder.with_suffix(".beton")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "train": make_images(folder / "train", "ab", 3),
        "test": make_images(folder / "test", "ab", 1),
        "other": make_images(folder / "other", "ac", 1),
        "three": make_images(folder / "three", "abc", 1),
        "masks": make_masks(folder / "masks"),
    }


@pytest.fixture
def refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., str]:
    """Launch what must be refused, and return the sentence."""
    monkeypatch.setattr(command_line, "set_up_logging", lambda: None)
    for module in (command_line, evaluate):
        monkeypatch.setattr(module, "start_ranks", lambda *_: pytest.fail("not refused"))
    data = {"num_classes": 2, "train": str(files["train"]), "test": str(files["test"])}
    recipe = {**RECIPE, "output_dir": str(tmp_path / "run"), "data": data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "config.json").write_text("{}")

    def launch(*arguments: str, world_size: int = 1) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        flags = ["--recipe", str(tmp_path / "recipe.yaml")]
        flags += ["--deepspeed_config", str(tmp_path / "config.json")]
        assert finetune.main([*flags, *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return launch


def test_other_numbers_of_classes(refused: Any, files: dict[str, Path]) -> None:
    assert "set data.num_classes=2" in refused("data.num_classes=3")
    assert "has 3: convert both" in refused(f"data.test={files['three']}")


def test_other_classes(refused: Any, files: dict[str, Path]) -> None:
    assert f"the class 'b' of {files['train']} is 'c' in" in refused(f"data.test={files['other']}")


def test_missing_files(refused: Any, tmp_path: Path) -> None:
    assert "nowhere" in refused(f"data.test={tmp_path}/nowhere")
    assert "nowhere" in refused(f"data.train={tmp_path}/nowhere")


def test_masks_instead_of_labels(refused: Any, files: dict[str, Path]) -> None:
    assert "holds masks: give a file with class labels" in refused(f"data.train={files['masks']}")


def test_fewer_images_than_a_batch(refused: Any) -> None:
    sentence = refused("finetune.batch_size=8")
    assert "finetune.batch_size is 8" in sentence and "6 images" in sentence


def test_an_odd_share_of_a_batch_cannot_be_mixed(refused: Any) -> None:
    sentence = refused("mixup.prob=1.0", "finetune.batch_size=6", world_size=2)
    assert "gives each rank 3 images" in sentence and "mixup=null" in sentence


def test_weights_without_an_encoder(refused: Any, tmp_path: Path) -> None:
    head = {"decoder_embed.weight": torch.zeros(4, 16), "mask_token": torch.zeros(1, 1, 4)}
    save_file(head, tmp_path / "decoder.safetensors")
    assert "decoder.safetensors" in refused("--init_from", str(tmp_path / "decoder.safetensors"))


def test_an_encoder_of_another_size(refused: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe, ["model.embed_dim=32"])
    save_file(build_classifier(recipe).state_dict(), tmp_path / "wide.safetensors")
    assert "embed_dim" in refused("--init_from", str(tmp_path / "wide.safetensors"))


def test_what_is_evaluated_must_be_a_classifier(refused: Any, tmp_path: Path) -> None:
    def save(*changes: str) -> str:
        recipe = load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe, changes)
        save_file(build_classifier(recipe).state_dict(), tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")

    sentence = refused("--evaluate", save("model.global_pool=token"))
    assert "holds no fc_norm.weight" in sentence and "model.global_pool avg" in sentence
    sentence = refused("--evaluate", save("data.num_classes=3"))
    assert "head.weight of shape [3, 16]" in sentence and "data.num_classes" in sentence
    assert "nowhere does not exist" in refused("--evaluate", f"{tmp_path}/nowhere")


def test_an_evaluation_needs_no_training_images(refused: Any, tmp_path: Path) -> None:
    sentence = refused(
        "--evaluate", "a.pth", f"data.train={tmp_path}/nowhere", "data.num_classes=3"
    )
    assert "set data.num_classes=2" in sentence
