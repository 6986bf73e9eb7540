"""Real runs of fine-tuning on two ranks: against a plain loop, over ZeRO stages, resumed."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_ffcv import Augmentation, open_eval_loader, open_stream
from eval.finetuning.network import build_classifier
from eval.finetuning.recipe import FinetuneRecipe
from tests.eval.finetuning.runs import (
    MEAN,
    NUM_CLASSES,
    NUM_STEPS,
    NUM_TEST,
    STD,
    FinetuneSetup,
    last,
)
from tests.ranks import run_ranks
from tests.runs import contents, metrics_rows

STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FinetuneSetup:
    """Every run of this file, made by one pair of processes."""
    setup = FinetuneSetup(tmp_path_factory.mktemp("finetune"))
    launches = [
        setup.launch("plain", method="plain", stage=2),
        setup.launch("parts", "finetune.gradient_accumulation_steps=2", method="plain", stage=0),
        setup.launch(
            "bf16", method="random", deepspeed_config=setup.config(2, bf16={"enabled": True})
        ),
    ]
    expected = [0, 0, 0]
    for stage, (rank, cycle) in zip(STAGES, ((0, 0), (1, 2), (0, 1)), strict=True):
        common = {"method": "random", "stage": stage}
        launches += [
            setup.launch(f"whole{stage}", **common),
            setup.launch(f"halves{stage}", **common, kill=(rank, cycle)),
            setup.launch(f"halves{stage}", **common, resume=True),
        ]
        expected += [0, 143, 0]
    function = "tests.eval.finetuning.runs:train_and_evaluate"
    ranks = run_ranks(function, 2, setup.folder, launches=launches, home=str(setup.folder))
    for outcomes in ranks:
        assert [code for code, _ in outcomes] == [*expected, 0, 0], outcomes
    return setup


def losses(run: Path) -> list[float]:
    return [record["finetune/loss"] for record in metrics_rows(run) if "finetune/loss" in record]


def evaluations(run: Path) -> list[dict[str, float]]:
    return [record for record in metrics_rows(run) if "test/accuracy" in record]


# --- against a plain loop ----------------------------------------------------------------------


def plain_vit(recipe: FinetuneRecipe) -> VisionTransformer:
    """timm's own network in its own words, with the run's initial weights."""
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=NUM_CLASSES,
        global_pool="avg", norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    vit.load_state_dict(build_classifier(recipe).state_dict())
    return vit


def scale(name: str) -> float:
    """layer_decay ** (L + 1 - g) with L = 2."""
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2}
    return 0.65 ** (3 - next((g for prefix, g in layers.items() if name.startswith(prefix)), 3))


def rate(step: int) -> float:
    """One step of warm-up from 0, then half a cosine over the other three to min_lr."""
    return 0.0 if step == 0 else 1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * (step - 1) / 3)) / 2


def plain_loop(setup: FinetuneSetup) -> tuple[list[float], Any, Any]:
    """Losses, weights and averaged weights of NUM_STEPS steps on whole batches."""
    recipe = setup.read("plain")
    vit = plain_vit(recipe)
    groups = [
        {
            "params": [param],
            "weight_decay": 0.05 if param.ndim == 2 or name == "patch_embed.proj.weight" else 0.0,
            "scale": scale(name),
        }
        for name, param in vit.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    average = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    losses = []
    with open_stream(
        recipe.data.train,
        augmentation=Augmentation(kind="center_crop", image_size=8),
        batch_size=16,
        seed=0,
        name="finetune",
        mean=MEAN,
        std=STD,
    ) as stream:
        for step in range(NUM_STEPS):
            images, labels = next(stream)
            loss = F.cross_entropy(vit(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["scale"]
            optimizer.step()
            losses.append(loss.item())
            for name, tensor in vit.state_dict().items():
                average[name] = 0.8 * average[name] + 0.2 * tensor
    return losses, vit.state_dict(), average


def parts(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor without the keys' biases: softmax ignores them, so their gradient is rounding."""
    if not name.endswith("qkv.bias"):
        return [tensor]
    query, _, value = tensor.chunk(3)
    return [query, value]


def test_engines_train_as_a_plain_loop_does(runs: FinetuneSetup) -> None:
    expected_losses, expected, expected_average = plain_loop(runs)
    assert losses(runs.folder / "plain") == pytest.approx(expected_losses, rel=1e-5)
    initial = plain_vit(runs.read("plain")).state_dict()
    for file, tensors in (("model", expected), ("model_ema", expected_average)):
        saved = load_file(last(runs.folder / "plain") / f"{file}.safetensors")
        assert saved.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert not torch.equal(tensor, initial[name])
            for mine, other in zip(parts(name, saved[name]), parts(name, tensor), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-6, msg=name)


def test_accuracies_are_those_of_the_saved_weights(runs: FinetuneSetup) -> None:
    """Counted image by image with timm's own network; the ranks have 7 and 6 images."""
    recipe, folder = runs.read("plain"), runs.folder / "plain"
    crop = Augmentation(kind="center_crop", image_size=8, resize=9)  # 8 * 256 / 224
    loader = open_eval_loader(
        recipe.data.test, augmentation=crop, batch_size=NUM_TEST, mean=MEAN, std=STD
    )
    images, labels = next(iter(loader))
    result = json.loads((folder / "result.json").read_text())
    for file, tag in (("model", "test"), ("model_ema", "test_ema")):
        vit = plain_vit(recipe).eval()
        vit.load_state_dict(load_file(last(folder) / f"{file}.safetensors"))
        with torch.no_grad():
            logits = vit(images)
        ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
        expected = {
            f"{tag}/accuracy": float((ranks < 1).float().mean()),
            f"{tag}/top5_accuracy": float((ranks < 5).float().mean()),
            f"{tag}/loss": float(F.cross_entropy(logits, labels)),
        }
        assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert result["num_test_images"] == NUM_TEST


def test_a_result_says_what_was_selected_on_the_test_images(runs: FinetuneSetup) -> None:
    folder = runs.folder / "whole2"
    result = json.loads((folder / "result.json").read_text())
    rows = evaluations(folder)
    assert [record["cycle"] for record in rows] == [2, 4]  # after each epoch, the last one once
    for tag in ("test", "test_ema"):
        assert result[f"{tag}/accuracy"] == rows[-1][f"{tag}/accuracy"]
        best = max(record[f"{tag}/accuracy"] for record in rows)
        assert result["best_on_test"][tag]["accuracy"] == best
    report = (folder / "report.md").read_text()
    assert "test: best on test" in report and "| test/accuracy |" in report


@pytest.mark.parametrize("name", ["plain", "foreign"])
def test_an_evaluation_alone_repeats_the_last_one(runs: FinetuneSetup, name: str) -> None:
    """Of a run by its output_dir, and of a file such as mae_finetuned_vit_base.pth."""
    alone = json.loads((runs.folder / name / "eval" / "finetune" / "result.json").read_text())
    trained = json.loads((runs.folder / "plain" / "result.json").read_text())
    for key in ("accuracy", "top5_accuracy", "loss"):
        assert alone[key] == trained[f"test/{key}"]
    assert alone["num_images"] == NUM_TEST


# --- stages, micro-batches, precision, resuming ------------------------------------------------


def test_micro_batches_change_nothing(runs: FinetuneSetup) -> None:
    whole, parts = (runs.folder / name for name in ("plain", "parts"))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_stages_agree_in_float32_while_everything_is_drawn(runs: FinetuneSetup) -> None:
    first, *others = [losses(runs.folder / f"whole{stage}") for stage in STAGES]
    assert len(first) == NUM_STEPS and all(map(math.isfinite, first))
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


def test_bfloat16_stays_near(runs: FinetuneSetup) -> None:
    single, half = (losses(runs.folder / name) for name in ("whole2", "bf16"))
    assert half == pytest.approx(single, rel=0.05) and half != single


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_changes_no_bit(runs: FinetuneSetup, stage: int) -> None:
    whole, halves = (runs.folder / f"{name}{stage}" for name in ("whole", "halves"))
    expected = contents(last(whole))
    assert "model_ema.safetensors/pos_embed" in expected
    assert any("/average/pos_embed@" in name for name in expected)
    assert contents(last(halves)) == expected
    assert metrics_rows(halves) == metrics_rows(whole)
    results = [json.loads((run / "result.json").read_text()) for run in (whole, halves)]
    for result in results:
        del result["seconds"], result["images_per_second"]
    assert results[0] == results[1]
