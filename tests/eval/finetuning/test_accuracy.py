"""Counting over ranks against counting every image by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from data_ffcv import Augmentation, EvalLoader, open_eval_loader
from data_ffcv.convert import convert
from eval.finetuning.accuracy import count_correct
from tests.ranks import run_ranks

NUM_CLASSES, NUM_IMAGES, SIDE = 6, 23, 4


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images of six classes; two ranks get 12 and 11, in 3 batches of 4 each."""
    folder = tmp_path_factory.mktemp("accuracy")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        home = folder / "png" / f"class{number % NUM_CLASSES}"
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    convert("imagefolder", folder / "png", folder / "test.beton")
    return folder / "test.beton"


def shard(path: Path, rank: int, world_size: int) -> EvalLoader:
    return open_eval_loader(
        path,
        augmentation=Augmentation(kind="center_crop", image_size=SIDE),
        batch_size=4,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        rank=rank,
        world_size=world_size,
    )


def project(images: torch.Tensor) -> torch.Tensor:
    """Some logits that depend on the image."""
    weight = torch.randn(3 * SIDE * SIDE, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    return images.flatten(1) @ weight


def count_on_rank(path: Path, topk: tuple[int, ...]) -> dict[str, float]:
    loader = shard(path, dist.get_rank(), dist.get_world_size())
    return count_correct(project, loader, torch.device("cpu"), topk)


def by_hand(path: Path, topk: tuple[int, ...]) -> dict[str, Any]:
    from sklearn.metrics import log_loss, top_k_accuracy_score  # late: the ranks need it not

    batches = list(shard(path, 0, 1))
    logits = project(torch.cat([images for images, _ in batches])).double()
    labels = torch.cat([labels for _, labels in batches])
    scores = {
        "accuracy" if k == 1 else f"top{k}_accuracy": top_k_accuracy_score(labels, logits, k=k)
        for k in topk
    }
    return {**scores, "loss": log_loss(labels, logits.softmax(1)), "num_images": NUM_IMAGES}


@pytest.mark.parametrize("world_size", [1, 2])
def test_uneven_shards_are_counted_once(beton: Path, tmp_path: Path, world_size: int) -> None:
    expected = by_hand(beton, (1, 3, 5))
    assert 0 < expected["accuracy"] < expected["top3_accuracy"] < expected["top5_accuracy"] < 1
    if world_size == 1:  # no process group
        results = [count_correct(project, shard(beton, 0, 1), torch.device("cpu"), (1, 3, 5))]
    else:
        function = "tests.eval.finetuning.test_accuracy:count_on_rank"
        results = run_ranks(function, world_size, tmp_path, path=beton, topk=(1, 3, 5))
    for result in results:
        assert result == pytest.approx(expected, rel=1e-6)


def test_a_k_above_the_number_of_classes_is_left_out(beton: Path) -> None:
    result = count_correct(project, shard(beton, 0, 1), torch.device("cpu"), (1, 7))
    assert set(result) == {"accuracy", "loss", "num_images"}
