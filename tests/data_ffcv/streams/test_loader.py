"""Streams are reproducible, shard exactly, resume bit for bit, and leave nothing behind."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_ffcv import Augmentation, DataError, inspect_beton, open_eval_loader
from data_ffcv.convert import convert
from tests.data_ffcv.conftest import NUM_GREY, UNIT
from tests.data_ffcv.streams.draws import (
    WHOLE,
    Batch,
    assert_same,
    draw,
    eval_loader,
    sample_numbers,
    stream,
)


@pytest.fixture(scope="module")
def reference(grey_beton: Path) -> list[Batch]:
    """The first 12 batches (5 an epoch) of the uninterrupted stream, one worker."""
    return draw(grey_beton, 12)


def test_shapes_types_and_normalisation(grey_beton: Path):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain = draw(grey_beton, 1, WHOLE)[0][0]
    images, labels = draw(grey_beton, 1, WHOLE, mean=mean, std=std)[0]
    assert images.shape == (40, 3, 28, 28) and images.dtype == torch.float32
    assert images.is_contiguous()
    assert labels.shape == (40,) and labels.dtype == torch.int64
    expected = (plain / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("kind", ["random_resized_crop", "pad_crop", "center_crop"])
def test_non_square_images(grey_beton: Path, kind: str):
    augmentation = Augmentation(kind, (12, 28))
    images, _ = draw(grey_beton, 1, augmentation)[0]
    assert images.shape == (40, 3, 12, 28) and images.is_contiguous()
    (images, _), *_ = open_eval_loader(
        grey_beton, augmentation=augmentation, batch_size=29, num_workers=2, **UNIT
    )
    assert images.shape == (29, 3, 12, 28)


def test_workers_do_not_change_a_bit(grey_beton: Path, reference: list[Batch]):
    assert_same(draw(grey_beton, 12, num_workers=2), reference)


@pytest.mark.parametrize("start_batch", [1, 4, 5, 7, 10])
def test_resume_is_bitwise(grey_beton: Path, reference: list[Batch], start_batch: int):
    with stream(grey_beton, start_batch=start_batch) as batches:
        assert batches.batches_drawn == start_batch
        resumed = [next(batches) for _ in range(12 - start_batch)]
        assert batches.batches_drawn == 12
    assert_same(resumed, reference[start_batch:])


def test_an_epoch_has_only_full_batches(grey_beton: Path):
    numbers = [batch[-1] for batch in draw(grey_beton, 10, with_numbers=True)]
    for start in (0, 5):
        epoch = torch.cat(numbers[start : start + 5])
        assert len(epoch.unique()) == len(epoch) == 200 <= NUM_GREY < 240


def test_resume_far_away_is_cheap(grey_beton: Path):
    assert len(draw(grey_beton, 1, start_batch=10**12)) == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_batches_of_one_rank(
    grey_beton: Path, reference: list[Batch], world_size: int
):
    ranks = [
        draw(grey_beton, 7, batch_size=40 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    union = [
        tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        for batches in zip(*ranks, strict=True)
    ]
    assert_same(union, reference[:7])


def test_each_epoch_is_another_permutation(grey_beton: Path):
    indices = np.arange(3, 83)
    batches = draw(grey_beton, 6, WHOLE, indices=indices)
    known = [n for images, _ in eval_loader(grey_beton) for n in sample_numbers(images)]
    epochs = [
        [n for images, _ in batches[start : start + 2] for n in sample_numbers(images)]
        for start in (0, 2, 4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(known[i] for i in indices)
    assert epochs[0] != epochs[1] != epochs[2]


def test_labels_belong_to_their_images(grey_beton: Path):
    for images, labels in draw(grey_beton, 5, WHOLE):
        assert [number % 10 for number in sample_numbers(images)] == labels.tolist()


def test_crops_change_from_epoch_to_epoch(grey_beton: Path):
    (first, _), (second, _) = draw(grey_beton, 2, indices=np.array([9]), batch_size=1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("other", [{"seed": 6}, {"name": "mask"}])
def test_seed_and_name_make_other_streams(
    grey_beton: Path, reference: list[Batch], other: dict[str, object]
):
    for images, _ in draw(grey_beton, 10, **other):
        assert not any(torch.equal(images, theirs) for theirs, _ in reference)


def test_three_interleaved_streams_do_not_disturb_each_other(
    grey_beton: Path, colour_beton: Path, reference: list[Batch]
):
    with (
        stream(grey_beton) as first,
        stream(grey_beton, Augmentation("pad_crop", 28), name="mask", num_workers=2) as second,
        stream(colour_beton, batch_size=4) as third,
    ):
        kept = [(next(first), next(second), next(third)) for _ in range(12)]
    assert_same([batch for batch, _, _ in kept], reference)
    assert_same(
        [batch for _, batch, _ in kept],
        draw(grey_beton, 12, Augmentation("pad_crop", 28), name="mask"),
    )
    assert_same([batch for _, _, batch in kept], draw(colour_beton, 12, batch_size=4))


def test_jpeg_and_raw_files_agree(image_folder: Path, colour_beton: Path, tmp_path: Path):
    jpg = convert("imagefolder", image_folder, tmp_path / "j.beton", write_mode="jpg")
    (ours, labels), (theirs, their_labels) = (
        draw(path, 1, batch_size=8)[0] for path in (jpg.path, colour_beton)
    )
    assert torch.equal(labels, their_labels)
    assert (ours - theirs).abs().mean() < 8


def test_close_ends_all_threads_and_torch_keeps_its_threads(grey_beton: Path):
    draw(grey_beton, 1)
    num_threads, torch_threads = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(torch_threads + 1)
    try:
        for _ in range(5):
            batches = stream(grey_beton, num_workers=2)
            next(batches)
            assert torch.get_num_threads() == torch_threads + 1
            batches.close()
            batches.close()
        next(iter(eval_loader(grey_beton)))
        assert torch.get_num_threads() == torch_threads + 1
    finally:
        torch.set_num_threads(torch_threads)
    gc.collect()
    assert threading.active_count() == num_threads
    with pytest.raises(DataError, match="closed"):
        next(batches)


def test_ffcv_does_not_break_numbas_byte_arrays(grey_beton: Path):
    """FFCV makes the shared type read-only; later compilations in the process would fail."""
    import numba

    byte_array = numba.uint8[::1]
    with stream(grey_beton) as batches:
        next(batches)
        assert byte_array.mutable


def test_forgotten_stream_is_stopped_when_collected_or_at_exit(grey_beton: Path):
    num_threads = threading.active_count()
    forgotten = stream(grey_beton)
    next(forgotten)
    del forgotten
    gc.collect()
    assert threading.active_count() == num_threads
    code = (
        "from data_ffcv import *\n"
        f"s = open_stream({str(grey_beton)!r}, augmentation=Augmentation('center_crop', 28),"
        " batch_size=8, seed=0, mean=[0.0] * 3, std=[1.0] * 3)\n"
        "next(s); print('drawn')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "drawn\n", "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 204}, "204; lower batch_size"),
        ({"batch_size": 102, "world_size": 2}, "lower batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"augmentation": ()}, "augmentation"),
        ({"indices": np.array([NUM_GREY])}, "indices"),
        ({"indices": np.arange(NUM_GREY) > 50}, "list of integers"),
        ({"indices": np.array([1.5])}, "list of integers"),
        ({"indices": ["a"]}, "list of integers"),
        ({"indices": [[1], [2, 3]]}, "list of integers"),
        ({"indices": np.array([], dtype=int)}, "lower batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"start_batch": -1}, "start_batch"),
        ({"num_workers": 0}, "num_workers"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_bad_settings_are_refused(grey_beton: Path, settings: dict[str, object], words: str):
    with pytest.raises(DataError, match=words):
        stream(grey_beton, **settings)


def test_damaged_file_is_refused_before_ffcv_opens_it(grey_beton: Path, tmp_path: Path):
    path = tmp_path / "short.beton"
    path.write_bytes(grey_beton.read_bytes()[:-8])
    with pytest.raises(DataError, match="truncated"):
        stream(path)


# ---- evaluation --------------------------------------------------------------------------


def test_eval_is_in_file_order_and_can_be_repeated(grey_beton: Path):
    loader = eval_loader(grey_beton)
    batches = list(loader)
    assert len(loader) == len(batches) == 7
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == inspect_beton(grey_beton).labels.tolist()
    numbers = [number for images, _ in batches for number in sample_numbers(images)]
    assert sorted(numbers) == list(range(NUM_GREY))
    assert_same(list(loader), batches)


def test_eval_shards_hold_every_sample_once(grey_beton: Path):
    numbers = [
        number
        for rank in range(3)
        for images, _ in eval_loader(grey_beton, rank=rank, world_size=3, num_workers=2)
        for number in sample_numbers(images)
    ]
    assert sorted(numbers) == list(range(NUM_GREY))


def test_eval_of_a_single_sample_keeps_the_batch_dimension(grey_beton: Path):
    (images, labels), *rest = eval_loader(grey_beton, indices=np.array([11]))
    assert images.shape == (1, 3, 28, 28) and labels.shape == (1,) and not rest


def test_eval_of_no_sample_is_empty(grey_beton: Path):
    loader = eval_loader(grey_beton, indices=np.array([0]), rank=1, world_size=2)
    assert len(loader) == 0 and list(loader) == []
