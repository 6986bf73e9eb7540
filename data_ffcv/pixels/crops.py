"""Compiled cuts without interpolation: copies of an image, nearest pixels of its mask."""

from typing import NamedTuple

import numpy as np

from data_ffcv.beton.layout import IGNORED
from data_ffcv.pixels.compiling import compile_inner

Pair = tuple[int, int]  # (vertical, horizontal)
Box = tuple[int, int, int, int]  # top, left, height, width


class Image(NamedTuple):
    """Where the pixels of an image or mask lie in a flat uint8 array.

    Loops take `values` out of it beforehand: numba would count references in every turn. They
    use unsigned positions: numba would test the sign of any other index.
    """

    values: np.ndarray
    start: int | np.int64  # position of the first pixel
    row_step: int  # from one row to the next
    column_step: int


class Cut(NamedTuple):
    """Resize image[box] to `shape`, take the window of `size` at `offset`, perhaps mirror it."""

    box: Box
    shape: Pair
    offset: Pair
    size: Pair
    flip: bool


@compile_inner
def fill(colour: tuple[int, int, int], size: Pair, out: Image) -> None:
    """Paints an image of `size`."""
    values = out.values
    for y in range(size[0]):
        i = np.uintp(out.start + out.row_step * y)
        for _ in range(size[1]):
            values[i] = np.uint8(colour[0])
            values[i + np.uintp(1)] = np.uint8(colour[1])
            values[i + np.uintp(2)] = np.uint8(colour[2])
            i += np.uintp(out.column_step)


@compile_inner
def copy(image: Image, cut: Cut, out: Image) -> None:
    """Writes what a cut without a resize finds inside the image."""
    values, results = image.values, out.values
    top, left = cut.box[0] + cut.offset[0], cut.box[1] + cut.offset[1]
    first, end = max(0, -left), min(cut.size[1], cut.box[1] + cut.shape[1] - left)
    for y in range(max(0, -top), min(cut.size[0], cut.box[0] + cut.shape[0] - top)):
        i = np.uintp(image.start + image.row_step * (top + y) + 3 * (left + first))
        column = cut.size[1] - 1 - first if cut.flip else first
        j = np.uintp(out.start + out.row_step * y + 3 * column)
        step = np.uintp(-3 if cut.flip else 3)
        for _ in range(end - first):
            results[j] = values[i]
            results[j + np.uintp(1)] = values[i + np.uintp(1)]
            results[j + np.uintp(2)] = values[i + np.uintp(2)]
            i += np.uintp(3)
            j += step


@compile_inner
def _nearest_pixels(in_size: int, out_size: int, first: int, count: int) -> np.ndarray:
    """Returns the source pixel of resized pixels first ... first + count - 1; -1 outside."""
    pixels = np.full(count, -1, np.int64)
    scale = in_size / out_size
    position = scale * 0.5
    for i in range(out_size):
        if 0 <= i - first < count:
            pixels[i - first] = int(position)
        position += scale  # Pillow adds up too, and rounds in the same places
    return pixels


@compile_inner
def cut_mask(mask: Image, cut: Cut, size: Pair, out: Image) -> None:
    """Writes a cut of a mask to out [size]: the nearest pixels, 255 outside of the mask."""
    values, results = mask.values, out.values
    top, left, height, width = cut.box
    for i in range(size[0] * size[1]):
        results[np.uintp(out.start + i)] = IGNORED
    rows = _nearest_pixels(height, cut.shape[0], cut.offset[0], cut.size[0])
    columns = _nearest_pixels(width, cut.shape[1], cut.offset[1], cut.size[1])
    for y in range(cut.size[0]):
        source = mask.start + mask.row_step * (top + rows[y]) + left
        target = out.start + out.row_step * y
        for x in range(cut.size[1]):
            column = columns[cut.size[1] - 1 - x if cut.flip else x]
            if rows[y] >= 0 and column >= 0:
                results[np.uintp(target + x)] = values[np.uintp(source + column)]
