"""A class for each pixel of an image of any size, by a network that is used to one crop."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_ffcv import normalise_images
from eval.segmentation.recipe import SegmentationRecipe
from mlomae.models.upernet import resize

Pair = tuple[int, int]  # (vertical, horizontal)
Logits = Callable[[Tensor], Tensor]  # images [B, 3, h, w] -> [B, num_classes, h, w]

_WINDOWS_AT_ONCE = 8
_CLASSES_AT_ONCE = 16  # bounds the memory where the stored image is large


@dataclass(frozen=True)
class Predictor:
    """Scales images, runs the network over them, and brings its answer back to their size.

    Masks are never resized: that would invent classes, or lose pixels.

    Args:
        network: in eval mode.
        recipe: its `inference`, its image_size as the window, mean and std of its images.
        device: the network's.
    """

    network: Logits
    recipe: SegmentationRecipe
    device: torch.device

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> class of each pixel, int64 [H, W], on the device."""
        recipe = self.recipe
        scaled = scale_image(image, recipe.inference.resize)
        tensor = normalise_images(scaled, recipe.data.mean, recipe.data.std).to(self.device)
        if recipe.inference.mode == "slide":
            logits = slide(self.network, tensor, recipe.model.image_size, recipe.stride)
        else:
            logits = whole(self.network, tensor, recipe.model.patch_size)
        return argmax_at(logits, image.shape[:2])


def scale_image(image: np.ndarray, shorter_side: int | None) -> np.ndarray:
    """Resize uint8 [H, W, 3] in its own aspect, as training images are; None keeps the size."""
    height, width = image.shape[:2]
    if shorter_side is None or shorter_side == min(height, width):
        return image
    factor = shorter_side / min(height, width)
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def slide(network: Logits, image: Tensor, window: Pair, stride: Pair) -> Tensor:
    """Mean logits [num_classes, H, W] of the windows that cover each pixel of [3, H, W].

    An image smaller than the window is filled below and to the right, with the mean colour as in
    training.
    """
    height, width = image.shape[1:]
    size = max(height, window[0]), max(width, window[1])
    padded, places = _pad(image, *size), window_places(size, window, stride)
    total: Tensor | None = None
    count = padded.new_zeros(size)
    for start in range(0, len(places), _WINDOWS_AT_ONCE):
        cuts = [
            (slice(top, top + window[0]), slice(left, left + window[1]))
            for top, left in places[start : start + _WINDOWS_AT_ONCE]
        ]
        logits = network(torch.stack([padded[:, rows, columns] for rows, columns in cuts]))
        if total is None:
            total = logits.new_zeros(logits.shape[1], *size)
        for (rows, columns), part in zip(cuts, logits, strict=True):
            total[:, rows, columns] += part
            count[rows, columns] += 1
    assert total is not None
    return (total / count)[:, :height, :width]


def window_places(size: Pair, window: Pair, stride: Pair) -> list[Pair]:
    """Top and left of each window, row by row; the last ones are shifted back inside (mmseg)."""
    rows, columns = (
        [min(start, whole - part) for start in range(0, whole - part + step, step)]
        for whole, part, step in zip(size, window, stride, strict=True)
    )
    return [(top, left) for top in rows for left in columns]


def whole(network: Logits, image: Tensor, multiple: int) -> Tensor:
    """Logits [num_classes, H, W] of [3, H, W] in one pass, filled up to a multiple of the patch."""
    height, width = image.shape[1:]
    padded = _pad(image, *(-(-side // multiple) * multiple for side in (height, width)))
    return network(padded[None])[0, :, :height, :width]


def argmax_at(logits: Tensor, size: Pair) -> Tensor:
    """Class with the largest of the logits [num_classes, h, w] at another size, int64 [H, W]."""
    best: Tensor | None = None
    for start in range(0, len(logits), _CLASSES_AT_ONCE):
        part = logits[None, start : start + _CLASSES_AT_ONCE]
        value, index = (part if part.shape[2:] == size else resize(part, size))[0].max(dim=0)
        if best is None:
            best, number = value, index
            continue
        is_better = value > best
        best = torch.where(is_better, value, best)
        number = torch.where(is_better, index + start, number)
    return number


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    """Fill normalised [3, h, w] below and to the right with the mean colour, which is 0."""
    below, right = height - image.shape[1], width - image.shape[2]
    return torch.nn.functional.pad(image, (0, right, 0, below))
