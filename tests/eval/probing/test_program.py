"""Linear probes as they are run, on one and on two ranks, against plain PyTorch loops."""

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from data_ffcv import open_stream, split_by_class
from data_ffcv.sources.folder_info import FolderInfo
from eval.probing.program import LinearProbeProgram
from mlomae.checkpoint.folders import find_checkpoint
from mlomae.recipe import load_recipe
from tests.eval.probing.runs import BATCH, EPOCHS, RATES, ProbeSetup, features_of, tiny_encoder
from tests.ranks import run_ranks
from tests.runs import contents, metrics_rows

NUM_STEPS = EPOCHS * 90 // BATCH
PROTOCOLS = ("mae", "mae_ct", "held_out")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ProbeSetup:
    return ProbeSetup(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def ends(setup: ProbeSetup) -> dict[str, Any]:
    """What every process returned, by number of ranks: one alone, then a pair."""
    one = [setup.launch(f"one/{protocol}", protocol) for protocol in PROTOCOLS]
    # A probe that is stopped, and goes on after its weights file was replaced.
    swapped, first, second = setup.folder / "swapped.pth", setup.encoder, setup.other_encoder
    changing = ("other", "mae", f"init_from={swapped}", "epochs=1")
    one += [
        setup.launch(*changing, copy=(first, swapped), kill=(0, 2)),
        setup.launch(*changing, copy=(second, swapped), resume=True),
    ]
    two = [
        setup.launch("zero0", "mae_ct"),
        setup.launch("zero3", "mae_ct", stage=3),
        setup.launch("zero0_bf16", "mae", bf16=True),
        setup.launch("zero3_bf16", "mae_ct", stage=3, bf16=True),
    ]
    parts = "probe.gradient_accumulation_steps=3"
    for name, protocol, stage, *more in (("lars", "mae", 0, parts), ("sgd", "held_out", 2)):
        two += [
            setup.launch(f"{name}/whole", protocol, *more, stage=stage),
            setup.launch(f"{name}/halves", protocol, *more, stage=stage, kill=(1, 6)),
            setup.launch(f"{name}/halves", protocol, *more, stage=stage, resume=True),
        ]
    return {
        world_size: run_ranks(
            "tests.eval.probing.runs:drive", world_size, setup.folder / name, launches=launches
        )
        for world_size, name, launches in ((1, "alone", one), (2, "pair", two))
    }


@pytest.fixture(scope="module")
def codes(ends: dict[int, Any]) -> dict[str, list[int]]:
    """Exit codes of the launches into each output_dir."""
    codes = defaultdict(list)
    for ranks in ends.values():
        for launches in zip(*(rank["launches"] for rank in ranks), strict=True):
            assert len({code for _, code, _ in launches}) == 1, launches
            run, code, _ = launches[0]
            codes[run].append(code)
    return codes


def heads_of(setup: ProbeSetup, run: str) -> dict[str, Tensor]:
    return load_file(find_checkpoint(setup.folder / run) / "model.safetensors")


def result_of(setup: ProbeSetup, run: str) -> dict[str, Any]:
    return json.loads((setup.folder / run / "result.json").read_text())


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        distance = (value.double() - b[name].double()).norm() / b[name].double().norm()
        assert float(distance) <= tolerance, name


# --- training ----------------------------------------------------------------------------------


def train_alone(setup: ProbeSetup, protocol: str, head: int) -> tuple[dict[str, Tensor], float]:
    """One head by a plain loop: SGD with momentum, or LARS, whose rate is written out here.

    Returns:
        Its tensors and those of the norm, and how far the weights moved, relative to their norm.
    """
    recipe = load_recipe(setup.recipe(protocol), LinearProbeProgram.schema)
    linear = LinearProbeProgram().module(recipe, "probe").heads[head]
    norm = nn.BatchNorm1d(16, eps=1e-6 if protocol == "mae" else 1e-5, affine=False)
    before = linear.weight.detach().clone()
    encoder, peak = tiny_encoder(), recipe.probe.base_lrs[head] * BATCH / 256
    momenta = [torch.zeros_like(p) for p in linear.parameters()]
    with open_stream(
        setup.train,
        augmentation=recipe.data.augmentation.build(8),
        batch_size=BATCH,
        seed=recipe.seed,
        mean=recipe.data.mean,
        std=recipe.data.std,
        name="probe",
    ) as stream:
        for step in range(NUM_STEPS):
            images, labels = next(stream)
            with torch.no_grad():
                features = norm(encoder(images))
            gradients = torch.autograd.grad(
                F.cross_entropy(linear(features), labels), list(linear.parameters())
            )
            with torch.no_grad():
                for param, momentum, grad in zip(
                    linear.parameters(), momenta, gradients, strict=True
                ):
                    trust = 0.001 * param.norm() / grad.norm() if param.ndim > 1 else 1.0
                    momentum.mul_(0.9).add_(grad * (trust if protocol == "mae" else 1.0))
                    param.sub_(momentum * rate(step, peak))
    place = "layer.2" if protocol == "mae" else f"layer.2.{head}"
    named = {f"layer.1.{name}": value for name, value in norm.state_dict().items()}
    named |= {f"{place}.{name}": p.detach() for name, p in linear.named_parameters()}
    return named, float((linear.weight.detach() - before).norm() / before.norm())


def rate(step: int, peak: float) -> float:
    """Linear from zero over a fifth of the steps, then half a cosine to zero."""
    warmup = round(NUM_STEPS * 0.6 / EPOCHS)
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (NUM_STEPS - warmup))) / 2


@pytest.mark.parametrize(
    ("protocol", "head"), [("mae", 0), *(("mae_ct", head) for head in range(len(RATES)))]
)
def test_each_head_is_trained_as_if_it_were_alone(setup, codes, protocol, head):
    assert codes[f"one/{protocol}"] == [0]
    together = heads_of(setup, f"one/{protocol}")
    alone, moved = train_alone(setup, protocol, head)
    assert moved > 0.2
    assert_same({name: together[name] for name in alone}, alone, 1e-4)


@pytest.mark.parametrize(
    ("run", "alone", "tolerance"),
    [
        ("zero0", "one/mae_ct", 1e-4),
        ("zero3", "one/mae_ct", 1e-4),
        ("lars/whole", "one/mae", 1e-4),
        ("sgd/whole", "one/held_out", 1e-4),
        ("zero0_bf16", "one/mae", 0.1),
        ("zero3_bf16", "one/mae_ct", 0.1),
    ],
)
def test_ranks_stages_and_parts_do_not_matter(setup, codes, run, alone, tolerance):
    assert (codes[run], codes[alone]) == ([0], [0])
    assert_same(heads_of(setup, run), heads_of(setup, alone), tolerance)
    if tolerance < 0.01:
        ours, theirs = result_of(setup, run), result_of(setup, alone)
        assert {k: v for k, v in ours.items() if "accuracy" in k} == {
            k: v for k, v in theirs.items() if "accuracy" in k
        }


def test_norm_sees_the_batches_of_all_ranks(ends):
    """Two ranks with half a batch each are one with the whole batch."""
    whole = nn.BatchNorm1d(6, eps=1e-6, affine=False).double()
    expected = torch.stack([whole(features_of(batch)) for batch in range(3)])
    outputs = torch.cat([rank["norm"][0] for rank in ends[2]], dim=1)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-6)
    for rank in ends[2]:
        for name in ("running_mean", "running_var"):
            value, expected = rank["norm"][1][name].double(), whole.state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", ["lars", "sgd"])
def test_resuming_changes_no_bit(setup, codes, run):
    assert (codes[f"{run}/whole"], codes[f"{run}/halves"]) == ([0], [143, 0])
    whole, halves = (setup.folder / run / name for name in ("whole", "halves"))
    expected = contents(find_checkpoint(whole))
    assert len(expected) > 10
    assert contents(find_checkpoint(halves)) == expected
    assert metrics_rows(halves) == metrics_rows(whole)
    ours, theirs = result_of(setup, f"{run}/halves"), result_of(setup, f"{run}/whole")
    clocks = ("seconds", "images_per_second")
    assert {k: v for k, v in ours.items() if k not in clocks} == {
        k: v for k, v in theirs.items() if k not in clocks
    }


def test_resuming_refuses_another_encoder(ends, codes):
    assert codes["other"] == [143, 2]
    stderr = ends[1][0]["launches"][-1][2]
    assert "swapped.pth holds other weights than those that this probe was begun with" in stderr


# --- what is reported --------------------------------------------------------------------------


def read_test(setup: ProbeSetup) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the test images, read without the project."""
    files = sorted(setup.test.glob("*/*.png"))
    labels = [int(file.parent.name.removeprefix("class")) for file in files]
    return np.stack([np.asarray(Image.open(file)) for file in files]), np.array(labels)


def accuracies(
    setup: ProbeSetup, run: str, pixels: np.ndarray, labels: np.ndarray, eps: float
) -> list[float]:
    """Of each saved head on whole images, computed from the file's tensors."""
    tensors = {name: tensor.double() for name, tensor in heads_of(setup, run).items()}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = tiny_encoder().double()(images)
    deviation = (tensors["layer.1.running_var"] + eps).sqrt()
    standard = (features - tensors["layer.1.running_mean"]) / deviation
    heads = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    logits = [standard @ tensors[f"{i}weight"].T + tensors[f"{i}bias"] for i in sorted(heads)]
    return [float((guess.argmax(1).numpy() == labels).mean()) for guess in logits]


def test_mae_reports_the_last_epoch(setup, codes):
    result = result_of(setup, "one/mae")
    (expected,) = accuracies(setup, "one/mae", *read_test(setup), 1e-6)
    assert result["accuracy"] == result["test/accuracy"] == expected
    assert result["epoch"] == EPOCHS
    assert result["test/best_accuracy"] >= expected


def test_mae_ct_reports_the_best_on_test_and_says_so(setup, codes):
    result = result_of(setup, "one/mae_ct")
    expected = accuracies(setup, "one/mae_ct", *read_test(setup), 1e-5)
    named = [result[f"test/accuracy_base_lr_{rate:g}"] for rate in RATES]
    assert named == expected and max(expected) > 0.45
    seen = [
        (value, record["epoch"], float(name.rpartition("_")[2]))
        for record in metrics_rows(setup.folder / "one/mae_ct")
        for name, value in record.items()
        if name.startswith("test/accuracy_base_lr")
    ]
    assert len(seen) == EPOCHS * len(RATES)
    assert result["accuracy"] == max(seen)[0]
    assert (result["accuracy"], result["epoch"], result["base_lr"]) in seen
    assert "test images" in result["selection"]


def test_held_out_chooses_without_the_test_images(setup, codes):
    result = result_of(setup, "one/held_out")
    info = FolderInfo(setup.train)
    _, held_out = split_by_class(info.labels, 0.1, seed=0)
    assert (result["num_train_images"], result["num_held_out_images"]) == (81, 9)
    pixels = np.stack([info.read(i) for i in held_out])
    chosen_on = accuracies(setup, "one/held_out", pixels, info.labels[held_out], 1e-5)
    on_test = accuracies(setup, "one/held_out", *read_test(setup), 1e-5)
    head = int(np.argmax(chosen_on))
    assert (result["base_lr"], result["accuracy"]) == (RATES[head], on_test[head])
    met = [
        record
        for record in metrics_rows(setup.folder / "one/held_out")
        if "test/accuracy" in record
    ]
    assert len(met) == 1 and met[0]["cycle"] == EPOCHS * (81 // BATCH)
