"""Pictures of segmentations: image, mask and prediction in fixed colours."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from eval.segmentation.metrics import IGNORED

CELL = 320  # longer side of a shown image, pixels; smaller ones are not enlarged
GAP = 4
_ENTRY, _LINE = 120, 16  # width and height of a name in the legend, pixels
_LETTERS = 16  # of a name that are shown
_OPACITY = 0.6  # of the colours over the image


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class number, and black for the rest: uint8 [256, 3].

    Pascal VOC's scheme, which spreads the bits of a number over the three channels, from its
    first colour after black on.
    """
    colours = np.zeros((256, 3), np.uint8)
    for number in range(min(num_classes, IGNORED)):
        rest = number + 1
        for bit in range(7, -1, -1):
            for channel in range(3):
                colours[number, channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
    return colours


def segmentation_picture(
    samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: Sequence[str]
) -> np.ndarray:
    """One row per sample: the image, its mask over it, the prediction over it; then a legend.

    Args:
        samples: image uint8 [H, W, 3], mask and prediction [H, W] as class numbers.
        classes: names; those that are seen are in the legend.

    Returns:
        uint8 [height, width, 3].
    """
    colours = palette(len(classes))
    rows = [
        [_fit(image), *(_fit(_overlay(image, colours[numbers])) for numbers in (mask, prediction))]
        for image, mask, prediction in samples
    ]
    width = max(sum(cell.shape[1] + GAP for cell in row) for row in rows) + GAP
    height = sum(row[0].shape[0] + GAP for row in rows) + GAP
    canvas = np.full((height, width, 3), 255, np.uint8)
    top = GAP
    for row in rows:
        left = GAP
        for cell in row:
            canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
            left += cell.shape[1] + GAP
        top += row[0].shape[0] + GAP
    seen = {int(n) for _, *maps in samples for numbers in maps for n in np.unique(numbers)}
    shown = [(classes[n], colours[n]) for n in sorted(seen - {IGNORED})]
    return np.concatenate([canvas, _legend(shown, width)])


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> np.ndarray:
    """Names with their colours, in as many columns as fit: uint8 [height, width, 3]."""
    num_columns = max(1, width // _ENTRY)
    image = Image.new("RGB", (width, _LINE * -(-len(entries) // num_columns)), "white")
    draw = ImageDraw.Draw(image)
    for number, (name, colour) in enumerate(entries):
        row, column = divmod(number, num_columns)
        left, top = GAP + column * _ENTRY, row * _LINE
        draw.rectangle((left, top, left + _LINE - GAP, top + _LINE - GAP), fill=tuple(colour))
        draw.text((left + _LINE, top), name[:_LETTERS], fill="black")
    return np.asarray(image)


def _overlay(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    mixed = (1 - _OPACITY) * image + _OPACITY * colours
    return mixed.round().astype(np.uint8)


def _fit(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    factor = min(1.0, CELL / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
