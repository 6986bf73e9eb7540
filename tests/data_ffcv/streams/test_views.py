"""Several views of an image, colours, random erasing, and masks, as streams hand them out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_ffcv import Augmentation, DataError, inspect_beton
from tests.data_ffcv.streams.draws import (
    CROP,
    WHOLE,
    assert_same,
    draw,
    eval_loader,
    sample_numbers,
    stream,
)

VIVID = Augmentation(
    "random_resized_crop",
    16,
    flip=True,
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    gaussian_blur_prob=0.5,
    solarize_prob=0.2,
)


def test_two_views_differ_and_the_first_is_the_only_one(grey_beton: Path):
    pairs = draw(grey_beton, 6, (CROP, CROP))
    single = draw(grey_beton, 6)
    assert_same([(first, labels) for first, _, labels in pairs], single)
    same = [
        torch.equal(a, b) for first, second, _ in pairs for a, b in zip(first, second, strict=True)
    ]
    assert not any(same)


def test_views_may_differ_in_size_and_augmentation(grey_beton: Path):
    whole, crop, labels = draw(grey_beton, 1, (WHOLE, CROP))[0]
    assert whole.shape == (40, 3, 28, 28) and crop.shape == (40, 3, 16, 16)
    assert torch.equal(whole, draw(grey_beton, 1, WHOLE)[0][0]) and labels.shape == (40,)


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_sample_numbers_come_last_and_change_nothing(grey_beton: Path, backend: str):
    """What is in the images tells which they are, too."""
    views = (WHOLE, CROP)
    where = {"batch_size": 20, "rank": 1, "world_size": 2, "start_batch": 3, "backend": backend}
    numbered = draw(grey_beton, 4, views, with_numbers=True, **where)
    assert_same([batch[:-1] for batch in numbered], draw(grey_beton, 4, views, **where))
    known = [n for images, _ in eval_loader(grey_beton) for n in sample_numbers(images)]
    for whole, _, _, numbers in numbered:
        assert numbers.dtype == torch.int64
        assert [known[number] for number in numbers] == sample_numbers(whole)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_colours_resume_bit_for_bit_with_any_number_of_workers(
    colour_beton: Path, num_workers: int
):
    views = (VIVID, CROP, VIVID)
    reference = draw(colour_beton, 6, views, batch_size=3)
    resumed = draw(colour_beton, 3, views, batch_size=3, start_batch=3, num_workers=num_workers)
    assert_same(resumed, reference[3:])


def test_colours_leave_the_geometry_alone(colour_beton: Path):
    """Brightness alone scales every pixel of an image by one factor."""
    bright = Augmentation("random_resized_crop", 16, flip=True, color_jitter=(0.5, 0, 0, 0))
    changed = 0
    for (images, _), (plain, _) in zip(
        draw(colour_beton, 4, bright, batch_size=4),
        draw(colour_beton, 4, batch_size=4),
        strict=True,
    ):
        for image, original in zip(images, plain, strict=True):
            unclipped = (image < 255) & (original > 50)
            factors = image[unclipped] / original[unclipped]
            assert factors.max() - factors.min() < 0.05
            changed += bool(abs(factors.mean() - 1) > 0.02)
    assert changed >= 8


def test_random_erasing_overwrites_rectangles_of_some_images(grey_beton: Path):
    erased = Augmentation("random_resized_crop", 16, flip=True, random_erasing_prob=0.5)
    num_changed = 0
    for (images, _), (plain, _) in zip(
        draw(grey_beton, 4, erased), draw(grey_beton, 4), strict=True
    ):
        for image, original in zip(images, plain, strict=True):
            rows, columns = torch.nonzero((image != original).any(dim=0), as_tuple=True)
            if len(rows):
                num_changed += 1
                box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert len(rows) == box < 0.5 * 16 * 16
    assert 50 < num_changed < 110  # of 160, half of them in the mean
    assert_same(draw(grey_beton, 2, erased, start_batch=2), draw(grey_beton, 4, erased)[2:])
    halves = [draw(grey_beton, 1, erased, batch_size=20, rank=r, world_size=2) for r in (0, 1)]
    union = torch.cat([batches[0][0] for batches in halves])
    assert torch.equal(union, draw(grey_beton, 1, erased)[0][0])


# ---- segmentation ------------------------------------------------------------------------


def test_masks_come_with_their_images(segmentation_beton: Path):
    info = inspect_beton(segmentation_beton)
    assert info.has_masks and info.labels is None
    crop = Augmentation("random_scale_crop", (24, 32), scale=(0.5, 2), resize=40, flip=True)
    for backend in ("threads", "auto"):
        (images, masks), *_ = draw(segmentation_beton, 2, crop, batch_size=4, backend=backend)
        assert images.shape == (4, 3, 24, 32) and images.dtype == torch.float32
        assert masks.shape == (4, 24, 32) and masks.dtype == torch.int64
        present = set(masks.unique().tolist())
        assert present <= {*range(info.num_classes), 255} and len(present) > 1
    reference = draw(segmentation_beton, 6, crop, batch_size=4)
    resumed = draw(segmentation_beton, 3, crop, batch_size=4, start_batch=3, num_workers=2)
    assert_same(resumed, reference[3:])


def test_what_lies_outside_an_image_is_mean_and_ignored(segmentation_beton: Path):
    """The mean colour is 0 once it is normalised."""
    tiny = Augmentation("random_scale_crop", 64, scale=(0.5, 0.5), resize=20)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
    images, masks = draw(segmentation_beton, 1, tiny, batch_size=4, mean=mean, std=std)[0]
    outside = images[:, :, 40:, 40:]
    assert outside.abs().max() <= 0.5 / 255 / 0.2 + 1e-6
    assert (masks[:, 40:, 40:] == 255).all() and (masks[:, :10, :10] != 255).any()


def test_whole_masks_are_those_that_were_converted(segmentation_beton: Path):
    info = inspect_beton(segmentation_beton)
    content = np.fromfile(segmentation_beton, np.uint8)
    side = min(info.min_height, info.min_width)
    loader = eval_loader(
        segmentation_beton, augmentation=Augmentation("center_crop", side), batch_size=3
    )
    masks = torch.cat([masks for _, masks in loader])
    assert len(masks) == info.num_samples
    for n, mask in enumerate(masks):
        height, width = int(info.samples.heights[n]), int(info.samples.widths[n])
        start = int(info.samples.mask_pointers[n])
        stored = content[start : start + height * width].reshape(height, width)
        top, left = round((height - side) / 2), round((width - side) / 2)
        assert np.array_equal(mask, stored[top : top + side, left : left + side])


def test_a_stream_of_masks_does_not_need_labels(segmentation_beton: Path):
    with stream(segmentation_beton, CROP, batch_size=2) as batches:
        assert [tensor.shape[0] for tensor in next(batches)] == [2, 2]


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_a_mask_with_an_unknown_class_is_named(
    segmentation_beton: Path, tmp_path: Path, backend: str
):
    """It would be an index out of range on the device."""
    path = tmp_path / "bad.beton"
    shutil.copy(f"{segmentation_beton}.json", f"{path}.json")
    content = bytearray(segmentation_beton.read_bytes())
    start = int(inspect_beton(segmentation_beton).samples.mask_pointers[5])
    content[start : start + 500] = b"\x04" * 500  # classes are 0 to 3
    path.write_bytes(content)
    whole = Augmentation("random_scale_crop", 200, scale=(1, 1))
    loader = eval_loader(path, augmentation=whole, batch_size=4, backend=backend)
    with pytest.raises(DataError, match=r"bad\.beton: the mask of sample 5 has the class 4.*are 4"):
        list(loader)
