"""Short ways to draw batches, shared by the tests of loading."""

import itertools
from pathlib import Path
from typing import Any

import torch

from data_ffcv import Augmentation, EvalLoader, Stream, open_eval_loader, open_stream
from tests.data_ffcv.conftest import UNIT

CROP = Augmentation("random_resized_crop", 16, flip=True)
WHOLE = Augmentation("center_crop", 28)
Batch = tuple[torch.Tensor, ...]


def stream(path: Path, augmentation: Any = CROP, **kwargs: Any) -> Stream:
    settings = {"augmentation": augmentation, "batch_size": 40, "seed": 5, **UNIT}
    return open_stream(path, **{**settings, **kwargs})


def draw(path: Path, count: int, augmentation: Any = CROP, **kwargs: Any) -> list[Batch]:
    with stream(path, augmentation, **kwargs) as batches:
        return list(itertools.islice(batches, count))


def eval_loader(path: Path, **kwargs: Any) -> EvalLoader:
    return open_eval_loader(path, **{"augmentation": WHOLE, "batch_size": 29, **UNIT, **kwargs})


def sample_numbers(images: torch.Tensor) -> list[int]:
    """Reads the number that the grey fixture wrote into its first two pixels."""
    return (images[:, 0, 0, 0].round() * 256 + images[:, 0, 0, 1].round()).int().tolist()


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == len(theirs)
        for tensor, other in zip(ours, theirs, strict=True):
            assert torch.equal(tensor, other)
