"""The mask picture, cell by cell."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlomae.models import MaskedAutoencoder
from mlomae.models.mae import Reconstruction
from mlomae.pictures import CELL, GAP, HIGH, LOW, mask_picture, save_picture

Bytes = NDArray[np.uint8]

MEAN, STD = (0.2, 0.5, 0.8), (0.3, 0.2, 0.1)
NUM_PATCHES = 16


def build(size: int = 28, *, normalise: bool = True) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        image_size=size, patch_size=size // 4, embed_dim=8, depth=0, num_heads=1,
        decoder_embed_dim=8, decoder_depth=0, decoder_num_heads=1, norm_pix_loss=normalise,
    )  # fmt: skip


def pixels(batch: int, size: int = 28) -> Bytes:
    return np.random.default_rng(0).integers(256, size=(batch, size, size, 3)).astype(np.uint8)


def normalised(values: Bytes) -> Tensor:
    images = (values / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def perfect(model: MaskedAutoencoder, images: Tensor) -> Reconstruction:
    """Random scores, and a decoder that makes no error."""
    scores = torch.rand(len(images), NUM_PATCHES, generator=torch.Generator().manual_seed(0))
    target = model.patchify(images)
    if model.norm_pix_loss:
        centred = target - target.mean(dim=-1, keepdim=True)
        target = centred / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return {
        "patch_loss": torch.zeros_like(scores),
        "mask": (scores.argsort(dim=1).argsort(dim=1) >= 4).float(),
        "scores": scores,
        "embedding": torch.zeros(len(images), NUM_PATCHES, 8),
        "prediction": target,
    }


def cells(picture: Bytes, rows: int) -> NDArray[np.uint8]:
    """The shown images without gaps, [rows, 4, side, side, 3]; checks that gaps are white."""
    side = (picture.shape[1] - GAP) // 4 - GAP
    assert picture.dtype == np.uint8
    assert picture.shape == (rows * (side + GAP) + GAP, 4 * (side + GAP) + GAP, 3)
    is_gap = np.ones(picture.shape[:2], dtype=bool)
    shown = []
    for row in range(rows):
        for column in range(4):
            top, left = (GAP + index * (side + GAP) for index in (row, column))
            is_gap[top : top + side, left : left + side] = False
            shown.append(picture[top : top + side, left : left + side])
    assert (picture[is_gap] == 255).all()
    return np.stack(shown).reshape(rows, 4, side, side, 3)


def patch_grid(cell: Bytes) -> NDArray[np.uint8]:
    """[side, side, 3] -> the 16 patches row by row, [16, side/4, side/4, 3]."""
    return np.stack([part for band in np.split(cell, 4) for part in np.split(band, 4, axis=1)])


@pytest.mark.parametrize(("size", "factor"), [(28, 4), (100, 1), (224, 1)])
def test_small_images_are_enlarged_without_smoothing(size, factor):
    assert factor == max(1, CELL // size)
    model, values = build(size), pixels(2, size)
    images = normalised(values)
    shown = cells(mask_picture(model, images, perfect(model, images), MEAN, STD), rows=2)
    assert shown.shape[2] == size * factor
    enlarged = np.kron(values, np.ones((1, factor, factor, 1), np.uint8))
    assert np.array_equal(shown[:, 0], enlarged)


def test_visible_patches_are_the_image_and_hidden_ones_its_mean_colour():
    model, values = build(), pixels(3)
    images = normalised(values)
    out = perfect(model, images)
    shown = cells(mask_picture(model, images, out, MEAN, STD), rows=3)
    grey = np.round(np.array(MEAN) * 255)
    for row, mask in zip(shown, out["mask"].tolist(), strict=True):
        for hidden, seen, true in zip(mask, patch_grid(row[2]), patch_grid(row[0]), strict=True):
            assert np.array_equal(seen, np.broadcast_to(grey, seen.shape) if hidden else true)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_perfect_prediction_is_the_image(normalise):
    model, values = build(normalise=normalise), pixels(2)
    images = normalised(values)
    shown = cells(mask_picture(model, images, perfect(model, images), MEAN, STD), rows=2)
    assert np.array_equal(shown[:, 3], shown[:, 0])


def test_only_hidden_patches_show_the_prediction():
    model, values = build(normalise=False), pixels(1)
    images = normalised(values)
    out = perfect(model, images)
    out["prediction"] = torch.full_like(out["prediction"], 100.0)  # beyond white: clipped
    row = cells(mask_picture(model, images, out, MEAN, STD), rows=1)[0]
    for hidden, made, true in zip(
        out["mask"][0], patch_grid(row[3]), patch_grid(row[0]), strict=True
    ):
        assert np.array_equal(made, np.full_like(made, 255) if hidden else true)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_score_colours_brighten_with_the_rank(shift):
    model, images = build(), normalised(pixels(3))
    out = perfect(model, images)
    out["scores"] = out["scores"] + shift  # only their order is shown
    shown = cells(mask_picture(model, images, out, MEAN, STD), rows=3)
    for row, scores in zip(shown, out["scores"], strict=True):
        patches = patch_grid(row[1])
        colours = patches[:, 0, 0].astype(int)
        assert np.array_equal(patches, np.broadcast_to(patches[:, :1, :1], patches.shape))
        ordered = colours[scores.argsort().tolist()]
        assert tuple(ordered[0]) == LOW and tuple(ordered[-1]) == HIGH
        assert (np.diff(ordered.sum(axis=1)) > 0).all()


def test_a_saved_picture_reads_back(tmp_path):
    picture = pixels(1)[0]
    save_picture(picture, str(tmp_path / "masks.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks.png")), picture)
