"""Metrics, inference and pictures of segmentation, against sums by hand and other libraries."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from data_ffcv import normalise_images
from eval.segmentation.inference import (
    Predictor,
    argmax_at,
    scale_image,
    slide,
    whole,
    window_places,
)
from eval.segmentation.metrics import ConfusionMatrix, SegmentationScores, score
from eval.segmentation.pictures import GAP, palette, segmentation_picture
from eval.segmentation.task import ENCODER, pixel_cross_entropy
from mlomae.models.upernet import UperNet
from mlomae.recipe import LevelRecipe, load_recipe
from mlomae.training.layer_decay import layer_decay_groups

CPU = torch.device("cpu")

# --- metrics -----------------------------------------------------------------------------------


def test_scores_of_a_case_by_hand():
    """Two images of four classes, of which the last occurs nowhere; 255 counts nowhere."""
    confusion = ConfusionMatrix(4, CPU)
    confusion.add(torch.tensor([[0, 1, 1], [2, 0, 3]]), torch.tensor([[0, 1, 255], [0, 0, 255]]))
    confusion.add(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 0, 0, 255]]))
    scores = score(confusion.reduce())
    # class 0: 5 pixels, 3 found, predicted 3 times; class 1: 2, 2, 3; class 2: 0, 0, 1
    assert scores.iou[:3] == pytest.approx((3 / 5, 2 / 3, 0.0)) and scores.iou[3] is None
    assert scores.mIoU == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    assert scores.mAcc == pytest.approx((3 / 5 + 1) / 2)
    assert scores.aAcc == pytest.approx(5 / 7)
    assert scores.num_left_out == 1
    assert scores.by_name(["a", "b", "c", "d"])["d"] is None


def test_masks_without_any_class_score_nothing():
    confusion = ConfusionMatrix(3, CPU)
    confusion.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    scores = score(confusion.reduce())
    assert scores == (0.0, 0.0, 0.0, (None, None, None))


def random_maps(count: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """Predictions and masks of several sizes, a fifth of their pixels without a class."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for number in range(count):
        size = (7 + number, 11)
        mask = torch.randint(num_classes, size, generator=generator)
        wrong = torch.rand(size, generator=generator) < 0.4
        prediction = torch.where(wrong, torch.randint(num_classes, size, generator=generator), mask)
        mask[torch.rand(size, generator=generator) < 0.2] = 255
        maps.append((prediction, mask))
    return maps


def scores_of_a_part(maps: list[tuple[Tensor, Tensor]], num_classes: int) -> Any:
    """Scores of this rank's maps and all others'. All ranks must call."""
    confusion = ConfusionMatrix(num_classes, CPU)
    for prediction, mask in maps[dist.get_rank() :: dist.get_world_size()]:
        confusion.add(prediction, mask)
    return tuple(score(confusion.reduce()))


def test_scores_are_scikit_learns_over_all_pixels():
    """Sums over the set: a mean over images gives another number."""
    maps, labels = random_maps(5, 6), list(range(6))
    prediction, mask = (torch.cat([m[i].flatten() for m in maps]) for i in (0, 1))
    prediction, mask = prediction[mask != 255], mask[mask != 255]
    iou = jaccard_score(mask, prediction, labels=labels, average=None)
    scores = score_of(maps, 6)
    assert scores.iou == pytest.approx(iou)
    assert scores.mIoU == pytest.approx(iou.mean())
    assert scores.mAcc == pytest.approx(recall_score(mask, prediction, average="macro"))
    assert scores.aAcc == pytest.approx(accuracy_score(mask, prediction))
    single = [score_of(maps[i : i + 1], 6).mIoU for i in range(5)]
    assert np.mean(single) != pytest.approx(iou.mean(), abs=1e-4)


def score_of(maps: list[tuple[Tensor, Tensor]], num_classes: int) -> SegmentationScores:
    confusion = ConfusionMatrix(num_classes, CPU)
    for prediction, mask in maps:
        confusion.add(prediction, mask)
    return score(confusion.reduce())


# --- loss --------------------------------------------------------------------------------------


def test_pixels_without_a_class_weigh_nothing_in_the_loss():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(3, (2, 4, 5))
    masks[0, :2] = masks[1, 3, 2:] = 255
    expected = 0.0
    for b, y, x in (masks != 255).nonzero().tolist():
        pixel = logits[b, :, y, x]
        expected = expected + pixel.exp().sum().log() - pixel[masks[b, y, x]]
    loss = pixel_cross_entropy(logits, masks)
    torch.testing.assert_close(loss, expected / 40)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.movedim(1, -1)[masks == 255].any()
    assert pixel_cross_entropy(logits, torch.full_like(masks, 255)) == 0


# --- inference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 8), [(0, 0)]),
        ((9, 8), [(0, 0), (1, 0)]),
        ((13, 8), [(0, 0), (5, 0)]),
        ((14, 19), [(0, 0), (0, 5), (0, 10), (0, 11), (5, 0), (5, 5), (5, 10), (5, 11),
                    (6, 0), (6, 5), (6, 10), (6, 11)]),
    ],
)  # fmt: skip
def test_window_places(size: tuple[int, int], expected: list[tuple[int, int]]):
    assert window_places(size, (8, 8), (5, 5)) == expected


@pytest.mark.parametrize("size", [(40, 57), (97, 33), (64, 64), (65, 200)])
def test_window_places_are_those_of_mmseg(size: tuple[int, int]):
    """mmseg counts windows by a formula of its own: max(H - h + s - 1, 0) // s + 1."""
    window, stride = (32, 24), (21, 16)
    expected = []
    counts = [
        max(whole - part + step - 1, 0) // step + 1
        for whole, part, step in zip(size, window, stride, strict=True)
    ]
    for row in range(counts[0]):
        for column in range(counts[1]):
            bottom = min(row * stride[0] + window[0], size[0])
            right = min(column * stride[1] + window[1], size[1])
            expected.append((max(bottom - window[0], 0), max(right - window[1], 0)))
    assert window_places(size, window, stride) == expected


def network(images: Tensor) -> Tensor:
    """Logits that depend on where in the window a pixel lies, and on its neighbours."""
    rows = torch.arange(images.shape[2])[:, None] / 7
    columns = torch.arange(images.shape[3]) / 5
    blurred = F.avg_pool2d(images, 3, 1, 1)
    return torch.cat([blurred + rows, images * columns], dim=1)


@pytest.mark.parametrize("size", [(40, 57), (97, 33), (32, 32), (20, 50), (50, 20), (9, 11)])
def test_slide_averages_the_windows_over_each_pixel(size: tuple[int, int]):
    """Pixel by pixel: the mean over all windows that cover it, the image filled with 0 if small."""
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    window, stride = (32, 24), (21, 16)
    full = [max(a, b) for a, b in zip(size, window, strict=True)]
    canvas = torch.zeros(3, *full)
    canvas[:, : size[0], : size[1]] = image
    sums = torch.zeros(6, *size, dtype=torch.float64)
    counts = torch.zeros(size)
    for top, left in window_places(tuple(full), window, stride):
        logits = network(canvas[None, :, top : top + 32, left : left + 24])[0]
        for y in range(top, min(top + 32, size[0])):
            for x in range(left, min(left + 24, size[1])):
                sums[:, y, x] += logits[:, y - top, x - left]
                counts[y, x] += 1
    assert counts.min() >= 1
    logits = slide(network, image, window, stride)
    torch.testing.assert_close(logits.double(), sums / counts, rtol=1e-5, atol=1e-5)


def test_whole_fills_up_to_patches_and_cuts_off_again():
    image = torch.randn(3, 21, 40)
    canvas = torch.zeros(1, 3, 24, 40)
    canvas[0, :, :21] = image
    assert torch.equal(whole(network, image, 8), network(canvas)[0, :, :21])


@pytest.mark.parametrize("size", [(30, 41), (9, 7), (15, 12)])
def test_argmax_is_that_of_resized_logits(size: tuple[int, int]):
    """Of 40 classes, so that the answer is put together from several parts."""
    torch.manual_seed(0)
    logits = torch.randn(40, 15, 12)
    logits[33] = logits[5]  # a tie goes to the first
    resized = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(argmax_at(logits, size), resized.argmax(dim=0))


def test_images_are_scaled_in_their_own_aspect():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    assert scale_image(image, 30).shape == (30, 45, 3)
    assert scale_image(image.transpose(1, 0, 2), 80).shape == (120, 80, 3)
    for same in (None, 60):
        assert np.array_equal(scale_image(image, same), image)


def test_normalised_pixels():
    image = np.array([[[0, 51, 255]]], np.uint8)
    pixels = normalise_images(image, (0.5, 0.2, 0.25), (0.5, 0.1, 0.25))
    torch.testing.assert_close(pixels, torch.tensor([-1.0, 0.0, 3.0])[:, None, None])


RECIPE = """
method: segmentation
output_dir: runs/none
epochs: 1
model: {image_size: [16, 24], patch_size: 8, embed_dim: 8, depth: 4, num_heads: 1}
data: {train: a.beton, test: b.beton, num_classes: 3, mean: [0, 0, 0], std: [1, 1, 1]}
segmentation: {batch_size: 2, lr: 0.1}
"""


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["inference.mode=whole"],
        ["inference.resize=32"],
        ["inference.stride=7"],
        ["inference.resize=12"],
        ["inference.mode=whole", "inference.resize=20"],
    ],
)
def test_predictions_lie_on_the_pixels_of_the_stored_image(settings: list[str], tmp_path: Path):
    """A network that names the strongest channel: the answer is the image's, whatever its size."""
    from eval.segmentation.recipe import SegmentationRecipe

    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml", SegmentationRecipe, settings)
    classes = np.random.default_rng(0).integers(0, 3, (5, 7)).repeat(9, 0).repeat(8, 1)
    image = np.eye(3, dtype=np.uint8)[classes] * 200
    predict = Predictor(lambda images: images, recipe, CPU)
    prediction = predict(image).numpy()
    assert prediction.shape == (45, 56)
    inner = np.zeros((9, 8), bool)  # resizing blurs the edges of the fields
    inner[3:6, 3:5] = True
    inner = np.tile(inner, (5, 7))
    assert np.array_equal(prediction[inner], classes[inner])
    if not any("resize" in setting for setting in settings):
        assert np.array_equal(prediction, classes)


# --- pictures ----------------------------------------------------------------------------------


def test_palette_is_pascal_vocs_after_black():
    colours = palette(150)
    expected = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    assert colours[:5].tolist() == [list(colour) for colour in expected]
    assert len(np.unique(colours[:150], axis=0)) == 150 and not colours[255].any()


def test_picture_shows_image_mask_and_prediction_and_names_the_colours():
    image = np.full((10, 6, 3), 100, np.uint8)
    mask, prediction = np.zeros((10, 6), np.uint8), np.ones((10, 6), np.int64)
    mask[5:] = 255
    small = np.zeros((4, 20, 3), np.uint8)
    samples = [(image, mask, prediction), (small, small[..., 0], small[..., 0])]
    picture = segmentation_picture(samples, ["tree", "road", "sky"])
    height = 10 + 4 + 3 * GAP
    assert picture.shape == (height + 2 * 16, 3 * 20 + 4 * GAP, 3)  # two names below each other
    assert (picture[[height + 4, height + 20], 8] == [[128, 0, 0], [0, 128, 0]]).all()
    lefts = [GAP + number * (6 + GAP) for number in range(3)]
    shown = [picture[GAP : GAP + 10, left : left + 6] for left in lefts]
    assert np.array_equal(shown[0], image)
    assert (shown[1][:5] == np.round(40 + 0.6 * np.array([128, 0, 0]))).all()
    assert (shown[1][5:] == 40).all()
    assert (shown[2] == np.round(40 + 0.6 * np.array([0, 128, 0]))).all()


@pytest.mark.parametrize("preset", ["standard", "tutorial"])
def test_layer_decay_follows_the_depth(preset):
    """Stem 0, block i in i + 1, neck and heads in L + 1; vectors, class token, positions as-is."""
    depth = 4
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=0
    )
    network = UperNet(vit, 3, preset=preset, channels=8 if preset == "standard" else None)
    level = LevelRecipe(batch_size=2, lr=1e-4, weight_decay=0.05)
    groups = layer_decay_groups(network, level, 0.65, ENCODER)
    groups = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert len(groups) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        block = re.match(r"backbone\.blocks\.(\d+)", name)
        layer = depth + 1
        if name.startswith("backbone"):
            layer = int(block[1]) + 1 if block else 0
        is_plain = parameter.ndim > 1 and name not in ("backbone.cls_token", "backbone.pos_embed")
        scale, decay = groups[id(parameter)]
        assert scale == pytest.approx(0.65 ** (depth + 1 - layer)), name
        assert decay == (0.05 if is_plain else 0.0), name
