"""Real runs of segmentation on two ranks: against a plain loop, over ZeRO stages, resumed."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

from data_ffcv import Augmentation, WholeImages, open_stream
from data_ffcv.convert import convert
from eval import segment
from eval.segmentation import program as segmentation_program
from eval.segmentation.inference import Predictor
from eval.segmentation.recipe import SegmentationRecipe
from eval.segmentation.task import join_weights
from mlomae.models.upernet import UperNet
from mlomae.recipe import load_recipe
from tests.eval.segmentation.test_parts import random_maps, score_of, scores_of_a_part
from tests.ranks import run_ranks
from tests.runs import Setup, contents, drive, metrics_rows

# Classes of an even number: ZeRO-3 pads odd parameters with whatever the memory held.
NUM_CLASSES, NUM_IMAGES, NUM_TEST, NUM_STEPS = 4, 16, 5, 4
COLOURS = np.array([(60, 60, 60), (200, 40, 40), (40, 60, 210), (50, 200, 60)])
PROGRAM = "eval.segment:SegmentationProgram"
MEAN, STD = (0.4, 0.3, 0.4), (0.25, 0.2, 0.3)

# nothing random after the initial weights
PLAIN: dict[str, Any] = {
    "method": "segmentation",
    "epochs": 2,  # of two steps each
    "model": {
        **{"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2},
        **{"layer_scale": 1.0, "attention": "math"},
    },
    "head": {"channels": 16, "dropout": 0.0},
    "data": {
        "num_classes": NUM_CLASSES,
        "mean": list(MEAN),
        "std": list(STD),
        "augmentation": {"kind": "center_crop", "resize": 16, "flip": False},
    },
    "segmentation": {
        **{"batch_size": 8, "lr": 0.01, "weight_decay": 0.05, "warmup_epochs": 0.5},
        **{"schedule": "linear", "layer_decay": 0.65},
    },
    "inference": {"resize": 18},
    "monitor": {"log_interval": 1, "eval_interval_epochs": 1, "num_pictures": 2},
}
# all that draws
RANDOM: dict[str, dict[str, Any]] = {
    "model": {"drop_path_rate": 0.2},
    "head": {"channels": 16, "dropout": 0.1},
    "data": {
        "augmentation": {
            "kind": "random_scale_crop",
            "scale": [0.5, 2.0],
            "resize": 18,
            "max_class_ratio": 0.75,
            "color_jitter": [0.1, 0.1, 0.1, 0.02],
        }
    },
}
STAGES = (0, 2, 3)


def make_images(folder: Path, count: int, seed: int) -> Path:
    """Noise in the colour of its class: a field each of three classes on the first."""
    rng = np.random.default_rng(seed)
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        height, width = [(20, 26), (24, 18), (12, 30)][number % 3]
        mask = np.zeros((height, width), np.uint8)
        for label in (1, 2, 3):
            top, left = rng.integers(0, height - 7), rng.integers(0, width - 7)
            mask[top : top + 7, left : left + 7] = label
        pixels = (COLOURS[mask] + rng.integers(-30, 31, (height, width, 3))).astype(np.uint8)
        mask[:, -1] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "annotations" / f"{number}.png")
    convert("segmentation", folder, folder.with_suffix(".beton"))
    return folder.with_suffix(".beton")


class SegmentSetup(Setup):
    """Adds the recipes `plain` and `random` to those of pretraining."""

    def __init__(self, folder: Path) -> None:
        train, test = folder / "train", folder / "test"
        super().__init__(folder, make_images(train, NUM_IMAGES, 0))
        plain = deepcopy(PLAIN)
        plain["output_dir"] = str(folder / "run")
        files = {"train": f"{train}.beton", "test": str(make_images(test, NUM_TEST, 1))}
        plain["data"] |= files
        random = deepcopy(plain)
        for section, values in RANDOM.items():
            random[section] |= values
        for name, recipe in (("plain", plain), ("random", random)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            self.recipes[name] = str(folder / f"{name}.yaml")
        (folder / "evaluate.json").write_text("{}")

    def launch(self, run: str, *overrides: str, **more: Any) -> dict[str, Any]:
        return super().launch(run, *overrides, **{"program": PROGRAM, **more})

    def read(self, name: str, *overrides: str) -> SegmentationRecipe:
        return load_recipe(self.recipes[name], SegmentationRecipe, overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SegmentSetup:
    """Every run of this file, made by one pair of processes."""
    setup = SegmentSetup(tmp_path_factory.mktemp("segment"))
    bf16 = {"deepspeed_config": setup.config(2, bf16={"enabled": True})}
    learning = (
        "epochs=15",
        "segmentation.layer_decay=1",
        "monitor={log_interval: 10, num_pictures: 1}",
    )
    tutorial = ("head={preset: tutorial}", "inference.mode=whole", "epochs=1")
    launches = [
        setup.launch("plain", method="plain", stage=2),
        setup.launch("bf16", method="random", **bf16),
        setup.launch("tutorial", *tutorial, "segmentation.gradient_accumulation_steps=2",
                     method="plain"),
        setup.launch("learning", *learning, method="random"),
    ]  # fmt: skip
    launches.append(setup.launch("whole0", method="random", stage=0))
    expected = [0, 0, 0, 0, 0]
    for stage, (rank, cycle) in ((2, (1, 2)), (3, (0, 1))):
        common = {"method": "random", "stage": stage}
        launches += [
            setup.launch(f"whole{stage}", **common),
            setup.launch(f"halves{stage}", **common, kill=(rank, cycle)),
            setup.launch(f"halves{stage}", **common, resume=True),
        ]
        expected += [0, 143, 0]
    function = "tests.eval.segmentation.test_program:train_and_evaluate"
    ranks = run_ranks(function, 2, setup.folder, launches=launches, home=str(setup.folder))
    for outcomes, _ in ranks:
        assert [code for code, _ in outcomes] == [*expected, 0], outcomes
    setup.scores = [scores for _, scores in ranks]
    return setup


def train_and_evaluate(launches: list[Any], home: str) -> tuple[list[tuple[int, str]], Any]:
    """Drive the launches, evaluate one of the runs, and score some maps."""
    outcomes = drive(launches)
    flags = ["--recipe", f"{home}/plain.yaml", "--deepspeed_config", f"{home}/evaluate.json"]
    with mock.patch("torch.distributed.destroy_process_group"):
        arguments = ["--evaluate", f"{home}/plain", f"output_dir={home}/alone"]
        code = segment.main([*flags, *arguments])
    return [*outcomes, (code, "")], scores_of_a_part(random_maps(5, 6), 6)


def losses(run: Path) -> list[float]:
    return [r["segmentation/loss"] for r in metrics_rows(run) if "segmentation/loss" in r]


def last(run: Path) -> Path:
    return run / "checkpoints" / f"step_{NUM_STEPS:08d}"


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def trained(setup: SegmentSetup, run: str) -> UperNet:
    """A network filled from the two files of a run's last checkpoint."""
    files = ("model.safetensors", "segmentation.safetensors")
    network = segmentation_program.build_network(setup.read("plain"))
    network.load_state_dict(
        join_weights(*(load_file(last(setup.folder / run) / name) for name in files))
    )
    return network.eval()


# --- against a plain loop ----------------------------------------------------------------------


def scale(name: str) -> float:
    """layer_decay ** (L + 1 - g) with L = 4."""
    parts = name.split(".")
    layer = 5 if parts[0] != "backbone" else int(parts[2]) + 1 if parts[1] == "blocks" else 0
    return 0.65 ** (5 - layer)


def rate(step: int) -> float:
    """One step of warm-up from 0, then a line over the other three to 0."""
    return 0.0 if step == 0 else 0.01 * (1 - (step - 1) / 3)


def plain_loop(setup: SegmentSetup) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and state of NUM_STEPS steps on whole batches, in one process."""
    recipe = setup.read("plain")
    network = segmentation_program.build_network(recipe)
    groups = [
        {
            "params": [p],
            "scale": scale(name),
            "weight_decay": 0.05 if p.ndim in (2, 4) else 0.0,  # tokens and positions have 3
        }
        for name, p in network.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    crop = Augmentation(kind="center_crop", image_size=16, resize=16)
    stream = open_stream(
        recipe.data.train, augmentation=crop, batch_size=8, seed=0, name="segmentation",
        mean=MEAN, std=STD,
    )  # fmt: skip
    losses = []
    with stream:
        for step in range(NUM_STEPS):
            images, masks = next(stream)
            out = network(images)
            shares = [
                F.cross_entropy(out[key], masks, ignore_index=255) * (masks != 255).float().mean()
                for key in ("logits", "auxiliary")
            ]
            loss = shares[0] + 0.4 * shares[1]
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["scale"]
            optimizer.step()
            losses.append(loss.item())
    return losses, network.state_dict()


def test_two_ranks_train_as_a_plain_loop_does(runs: SegmentSetup) -> None:
    """Batch norm, loss, schedule and layer decay at once."""
    expected_losses, expected = plain_loop(runs)
    assert losses(runs.folder / "plain") == pytest.approx(expected_losses, rel=1e-4)
    state = trained(runs, "plain").state_dict()
    assert state.keys() == expected.keys()
    # A batch norm takes its input's bias away: rounding moves that bias, and the running mean.
    for name in ("neck.0.1.running_var", "head.fusion.1.running_var", "head.classifier.weight"):
        torch.testing.assert_close(state[name], expected[name], rtol=1e-3, atol=1e-5)


def test_numbers_are_those_of_the_saved_weights(runs: SegmentSetup) -> None:
    """Image by image, window by window: 16 pixels on images whose shorter side gets 18."""
    network, folder = trained(runs, "plain"), runs.folder / "plain"
    masks, predictions = [], []
    for image, mask in WholeImages(runs.read("plain").data.test):
        height, width = mask.shape
        size = tuple(round(side * 18 / min(height, width)) for side in (width, height))
        pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) / 255
        tensor = torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1).float()
        total, count = torch.zeros(NUM_CLASSES, *tensor.shape[1:]), torch.zeros(tensor.shape[1:])
        for top in {0, tensor.shape[1] - 16}:
            for left in {*range(0, tensor.shape[2] - 16, 10), tensor.shape[2] - 16}:
                rows, columns = slice(top, top + 16), slice(left, left + 16)
                with torch.no_grad():
                    window = network(tensor[None, :, rows, columns])["logits"][0]
                total[:, rows, columns] += window
                count[rows, columns] += 1
        logits = F.interpolate((total / count)[None], (height, width), mode="bilinear")[0]
        predictions.append(logits.argmax(0).numpy()[mask != 255])
        masks.append(mask[mask != 255])
    iou = jaccard_score(np.concatenate(masks), np.concatenate(predictions), average=None)
    measured = result(folder)
    assert list(measured["IoU"].values()) == pytest.approx(iou.tolist(), abs=1e-6)
    assert measured["test/mIoU"] == pytest.approx(iou.mean())
    assert measured["num_test_images"] == NUM_TEST and measured["num_classes_left_out"] == 0
    evaluations = [record for record in metrics_rows(folder) if "test/mIoU" in record]
    assert [record["cycle"] for record in evaluations] == [2, 4]
    assert "| IoU 2 |" in (folder / "report.md").read_text()
    assert Image.open(folder / "segmentation.png").size[0] > 3 * 18


def test_an_evaluation_alone_repeats_the_last_one(runs: SegmentSetup) -> None:
    alone = result(runs.folder / "alone" / "eval" / "segment")
    whole = result(runs.folder / "plain")
    for key in ("test/mIoU", "test/mAcc", "test/aAcc", "IoU", "num_test_images", "inference"):
        assert alone[key] == whole[key]
    pictures = [
        (folder / "segmentation.png").read_bytes()
        for folder in (runs.folder / "plain", runs.folder / "alone" / "eval" / "segment")
    ]
    assert pictures[0] == pictures[1]


def test_scores_over_ranks_are_those_of_all_pixels(runs: SegmentSetup) -> None:
    """Five images on two ranks, against scikit-learn."""
    maps = random_maps(5, 6)
    prediction, mask = (torch.cat([m[i].flatten() for m in maps]) for i in (0, 1))
    iou = jaccard_score(mask[mask != 255], prediction[mask != 255], average=None)
    for mean_iou, *_, classes in runs.scores:
        assert classes == pytest.approx(iou)
        assert mean_iou == pytest.approx(iou.mean())


# --- learning, stages, precision, resuming -----------------------------------------------------


def test_it_learns_to_tell_colours(runs: SegmentSetup) -> None:
    """Untrained it scores what chance gives."""
    recipe = runs.read("random")
    untrained, maps = segmentation_program.build_network(recipe).eval(), []
    predict = Predictor(lambda images: untrained(images)["logits"], recipe, torch.device("cpu"))
    for image, mask in WholeImages(recipe.data.test):
        maps.append((predict(image), torch.from_numpy(mask).long()))
    assert score_of(maps, NUM_CLASSES).mIoU < 0.4
    assert result(runs.folder / "learning")["test/mIoU"] > 0.6


def test_stages_agree_in_float32_while_everything_is_drawn(runs: SegmentSetup) -> None:
    first, *others = [losses(runs.folder / f"whole{stage}") for stage in STAGES]
    assert len(first) == NUM_STEPS and all(map(math.isfinite, first))
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


def test_bfloat16_stays_near(runs: SegmentSetup) -> None:
    single, half = (losses(runs.folder / name) for name in ("whole2", "bf16"))
    assert half == pytest.approx(single, rel=0.05) and half != single


def test_the_tutorials_head_in_micro_batches_and_whole_images(runs: SegmentSetup) -> None:
    measured = result(runs.folder / "tutorial")
    assert 0 < measured["test/aAcc"] < 1 and measured["inference"]["mode"] == "whole"
    assert all(map(math.isfinite, losses(runs.folder / "tutorial")))


@pytest.mark.parametrize("stage", [2, 3])
def test_resuming_changes_no_bit(runs: SegmentSetup, stage: int) -> None:
    whole, halves = (runs.folder / f"{name}{stage}" for name in ("whole", "halves"))
    expected = contents(last(whole))
    assert "segmentation.safetensors/neck.0.1.running_mean" in expected
    assert contents(last(halves)) == expected
    assert metrics_rows(halves) == metrics_rows(whole)
    results = [result(run) for run in (whole, halves)]
    for measured in results:
        del measured["seconds"], measured["images_per_second"]
    assert results[0] == results[1]
