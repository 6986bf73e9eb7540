"""The mask picture, cell by cell."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlomae.models import MaskedAutoencoder
from mlomae.models.mae import Reconstruction
from mlomae.pretraining.pictures import CELL, GAP, HIGH, LOW, mask_picture
from mlomae.training.monitor import save_picture

Bytes = NDArray[np.uint8]

MEAN, STD = (0.2, 0.5, 0.8), (0.3, 0.2, 0.1)


def build(size: int | tuple[int, int] = 28, *, normalise: bool = True) -> MaskedAutoencoder:
    patch_size = 7 if isinstance(size, tuple) else size // 4
    return MaskedAutoencoder(
        image_size=size, patch_size=patch_size, embed_dim=8, depth=0, num_heads=1,
        decoder_embed_dim=8, decoder_depth=0, decoder_num_heads=1, norm_pix_loss=normalise,
    )  # fmt: skip


def pixels(batch: int, height: int = 28, width: int | None = None) -> Bytes:
    shape = (batch, height, width or height, 3)
    return np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)


def normalised(values: Bytes) -> Tensor:
    images = (values / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def perfect(model: MaskedAutoencoder, images: Tensor) -> Reconstruction:
    """Random scores, and a decoder that makes no error."""
    scores = torch.rand(len(images), model.num_patches, generator=torch.Generator().manual_seed(0))
    target = model.patchify(images)
    if model.norm_pix_loss:
        centred = target - target.mean(dim=-1, keepdim=True)
        target = centred / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return {
        "patch_loss": torch.zeros_like(scores),
        "mask": (scores.argsort(dim=1).argsort(dim=1) >= 4).float(),
        "scores": scores,
        "restore": scores.argsort(dim=1).argsort(dim=1),
        "embedding": torch.zeros(len(images), model.num_patches, 8),
        "prediction": target,
    }


def cells(picture: Bytes, rows: int) -> NDArray[np.uint8]:
    """The shown images without gaps, [rows, 4, height, width, 3]; checks that gaps are white."""
    height, width = ((n - GAP) // k - GAP for n, k in zip(picture.shape, (rows, 4), strict=False))
    assert picture.dtype == np.uint8
    assert picture.shape == (rows * (height + GAP) + GAP, 4 * (width + GAP) + GAP, 3)
    is_gap = np.ones(picture.shape[:2], dtype=bool)
    shown = []
    for row in range(rows):
        for column in range(4):
            top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
            is_gap[top : top + height, left : left + width] = False
            shown.append(picture[top : top + height, left : left + width])
    assert (picture[is_gap] == 255).all()
    return np.stack(shown).reshape(rows, 4, height, width, 3)


def patch_grid(cell: Bytes, rows: int = 4, columns: int = 4) -> NDArray[np.uint8]:
    """[height, width, 3] -> the patches row by row, [N, height/rows, width/columns, 3]."""
    bands = np.split(cell, rows)
    return np.stack([part for band in bands for part in np.split(band, columns, axis=1)])


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


@pytest.mark.parametrize(("height", "width", "factor"), [(14, 49, 2), (28, 21, 4), (35, 140, 1)])
def test_images_that_are_not_square_keep_their_aspect(height, width, factor):
    assert factor == max(1, CELL // max(height, width))
    model, values = build((height, width)), pixels(2, height, width)
    images = normalised(values)
    out = perfect(model, images)
    shown = cells(mask_picture(model, images, out, MEAN, STD), rows=2)
    assert shown.shape == (2, 4, height * factor, width * factor, 3)
    assert np.array_equal(shown[:, 0], np.kron(values, np.ones((1, factor, factor, 1), np.uint8)))
    assert np.array_equal(shown[:, 3], shown[:, 0])  # the prediction is perfect
    grey = np.round(np.array(MEAN) * 255)
    for row, mask, scores in zip(shown, out["mask"].tolist(), out["scores"], strict=True):
        true, colours, seen = (patch_grid(cell, height // 7, width // 7) for cell in row[:3])
        brightness = colours.sum(axis=-1).astype(int)
        assert brightness[:, 0, 0].argsort().tolist() == scores.argsort().tolist()
        assert (brightness == brightness[:, :1, :1]).all()
        for hidden, part, whole in zip(mask, seen, true, strict=True):
            assert np.array_equal(part, np.broadcast_to(grey, part.shape) if hidden else whole)


def test_a_saved_picture_reads_back(tmp_path):
    picture = pixels(1)[0]
    save_picture(picture, str(tmp_path / "masks.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks.png")), picture)
