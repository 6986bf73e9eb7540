"""Whole images of a segmentation file: every pixel as it was written, every sample once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError, WholeImages
from data_ffcv.convert import convert
from data_ffcv.splits import conversion_order


def written(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The files of a folder in the order in which the converter wrote them."""
    pairs = []
    for file in sorted((folder / "images").iterdir()):
        mask = folder / "annotations" / f"{file.stem}.png"
        pairs.append((np.asarray(Image.open(file)), np.asarray(Image.open(mask))))
    return [pairs[i] for i in conversion_order(len(pairs))]


def same(images: list, expected: list) -> bool:
    return len(images) == len(expected) and all(
        np.array_equal(a, b)
        for pair in zip(images, expected, strict=True)
        for a, b in zip(*pair, strict=True)
    )


def test_pixels_and_masks_are_those_of_the_files(segmentation_beton, segmentation_folder):
    images = WholeImages(segmentation_beton)
    assert len(images) == 12 and len({mask.shape for _, mask in images}) == 4
    for _ in range(2):  # it can be gone through again
        assert same(list(images), written(segmentation_folder))
    for image, mask in images:
        assert image.dtype == mask.dtype == np.uint8
        image[:], mask[:] = 0, 0  # the caller's own
    assert same(list(images), written(segmentation_folder))


def test_jpegs_are_decoded(segmentation_folder, tmp_path):
    convert("segmentation", segmentation_folder, tmp_path / "a.beton", write_mode="jpg")
    expected = written(segmentation_folder)
    images = list(WholeImages(tmp_path / "a.beton"))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(images, expected, strict=True))
    errors = [np.abs(a[0].astype(int) - b[0]).mean() for a, b in zip(images, expected, strict=True)]
    assert 0 < max(errors) < 4


@pytest.mark.parametrize("world_size", [1, 5, 13])
def test_each_sample_once_over_ranks(segmentation_beton, segmentation_folder, world_size):
    ranks = [WholeImages(segmentation_beton, None, r, world_size) for r in range(world_size)]
    indices = np.concatenate([rank.indices for rank in ranks])
    assert sorted(indices) == list(range(12))
    images = [pair for rank in ranks for pair in rank]
    assert same(images, [written(segmentation_folder)[i] for i in indices])


def test_some_samples(segmentation_beton, segmentation_folder):
    images = list(WholeImages(segmentation_beton, np.array([7, 2, 4]), rank=1, world_size=2))
    assert same(images, [written(segmentation_folder)[2]])


def test_what_is_refused(segmentation_beton, colour_beton, image_folder, tmp_path):
    for path in (colour_beton, image_folder):
        with pytest.raises(DataError, match="holds no masks; give"):
            WholeImages(path)
    with pytest.raises(DataError, match="indices"):
        WholeImages(segmentation_beton, np.array([12]))
    damaged = tmp_path / "damaged.beton"
    content = bytearray(segmentation_beton.read_bytes())
    place = int(WholeImages(segmentation_beton).info.samples.mask_pointers[3])
    content[place] = 4
    damaged.write_bytes(content)
    side = segmentation_beton.with_name(f"{segmentation_beton.name}.json")
    (tmp_path / "damaged.beton.json").write_text(side.read_text())
    with pytest.raises(DataError, match="mask of sample 3 has the class 4, but there are 4;"):
        list(WholeImages(damaged))
