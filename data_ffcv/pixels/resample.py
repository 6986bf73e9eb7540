"""Compiled antialiased resize of one image, equal to Pillow's.

Both passes, along x and along y, are one function that adds whole rows, so that its inner loops
run over neighbouring bytes and become vector instructions; along x it works on the transpose.
"""

import math
from typing import NamedTuple

import numpy as np

from data_ffcv.pixels.compiling import compile_inner
from data_ffcv.pixels.crops import Cut, Image, Pair

# Pillow's fixed point: weights have 22 fractional bits, each pass rounds to 8 bits.
_BITS = 22
_HALF = 1 << (_BITS - 1)
_NUM_LANES = 32  # rows that are transposed and resized along x at once
_LANES_STEP = 4 * _NUM_LANES  # bytes of one column of them; a pixel has four

Line = tuple[int, int | np.int64, int]  # output pixels of an axis: first, step to the next, count
Axis = tuple[np.ndarray, np.ndarray]  # what _axis_weights returns
# Of four neighbouring taps: where their rows begin, and their weights in fixed point.
Positions = tuple[np.uintp, np.uintp, np.uintp, np.uintp]
Taps = tuple[np.int32, np.int32, np.int32, np.int32]


class Scratch(NamedTuple):
    """Memory of `resize`, flat."""

    columns: np.ndarray  # uint8, _NUM_LANES rows of the image, transposed
    results: np.ndarray  # uint8, the same after the resize along x
    middle: np.ndarray  # uint8, the image between the two passes
    sums: np.ndarray  # int32, _HALF between calls


@compile_inner
def make_scratch(table: np.ndarray, size: Pair) -> Scratch:
    """Returns memory for images whose heights and widths end the table's rows."""
    height, width = 1, 1
    for n in range(len(table)):
        height, width = max(height, table[n, 3]), max(width, table[n, 4])
    columns = np.zeros(width * _LANES_STEP, np.uint8)
    results = np.zeros(size[1] * _LANES_STEP, np.uint8)
    middle = np.empty(3 * max(height * size[1], size[0] * width), np.uint8)
    sums = np.empty(max(3 * width, 3 * size[1], _LANES_STEP), np.int32)
    for i in range(len(sums)):
        sums[i] = _HALF
    return Scratch(columns, results, middle, sums)


@compile_inner
def _cubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5, which Pillow uses."""
    x = abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return near if x < 1.0 else (far if x < 2.0 else 0.0)


@compile_inner
def _tap_ranges(scale: float, in_size: int, line: Line, bicubic: bool) -> Axis:
    """Returns the first source pixel of each output pixel, and the one behind its last."""
    first, step, count = line
    reach = 2.0 * max(scale, 1.0)
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        low, high = (first + step * i) * scale, (first + step * i + 1) * scale
        if bicubic:
            center = (low + high) / 2
            starts[i] = max(int(center - reach + 0.5), 0)
            ends[i] = min(int(center + reach + 0.5), in_size)
        else:
            starts[i] = min(int(low), in_size - 1)
            ends[i] = min(max(math.ceil(high), starts[i] + 1), in_size)
    return starts, ends


@compile_inner
def _axis_weights(in_size: int, out_size: int, line: Line, bicubic: bool) -> Axis:
    """Weights that make some output pixels of one resized axis.

    Returns (starts [count], weights [num_taps, count] in fixed point); num_taps is a multiple of
    four, what a pixel does not need of it is zero.
    """
    first, step, count = line
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    starts, ends = _tap_ranges(scale, in_size, line, bicubic)
    num_taps = 0
    for i in range(count):
        num_taps = max(num_taps, ends[i] - starts[i])
    taps, totals = np.empty((num_taps, count)), np.zeros(count)
    for k in range(num_taps):
        for i in range(count):
            pixel, low, high = (
                starts[i] + k,
                (first + step * i) * scale,
                (first + step * i + 1) * scale,
            )
            if bicubic:
                tap = _cubic((pixel - (low + high) / 2 + 0.5) / stretch)
            else:
                tap = max(min(pixel + 1.0, high) - max(float(pixel), low), 0.0)
            taps[k, i] = tap if pixel < ends[i] else 0.0
            totals[i] += taps[k, i]
    weights = np.zeros(((num_taps + 3) // 4 * 4, count), np.int32)
    for k in range(num_taps):
        for i in range(count):
            weights[k, i] = math.floor(taps[k, i] / totals[i] * (1 << _BITS) + 0.5)
    return starts, weights


@compile_inner
def _quad(image: Image, num_rows: int, axis: Axis, k: int, i: int) -> tuple[Positions, Taps]:
    """Returns where the rows of taps k ... k + 3 of output row i begin, and their weights."""
    starts, weights = axis
    row, last = starts[i] + k, num_rows - 1  # rows behind the last have no weight
    positions = (
        np.uintp(image.start + image.row_step * min(row, last)),
        np.uintp(image.start + image.row_step * min(row + 1, last)),
        np.uintp(image.start + image.row_step * min(row + 2, last)),
        np.uintp(image.start + image.row_step * min(row + 3, last)),
    )
    return positions, (weights[k, i], weights[k + 1, i], weights[k + 2, i], weights[k + 3, i])


@compile_inner
def _dot(values: np.ndarray, positions: Positions, weights: Taps, i: np.uintp) -> np.int32:
    a, b, c, d = positions
    return np.int32(
        weights[0] * np.int32(values[a + i])
        + weights[1] * np.int32(values[b + i])
        + weights[2] * np.int32(values[c + i])
        + weights[3] * np.int32(values[d + i])
    )


@compile_inner
def _clip(fixed_point: np.int32) -> np.uint8:
    value = np.int32(fixed_point >> np.int32(_BITS))
    return np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@compile_inner
def _resize_rows(
    image: Image,
    num_rows: int,
    num_bytes: int,
    axis: Axis,
    out: Image,
    sums: np.ndarray,
) -> None:
    """Resizes the first axis of image [num_rows, num_bytes]."""
    num_taps, size = axis[1].shape
    values, results = image.values, out.values
    for y in range(size):
        for k in range(0, num_taps - 4, 4):
            positions, weights = _quad(image, num_rows, axis, k, y)
            for i in range(num_bytes):
                j = np.uintp(i)
                sums[j] += _dot(values, positions, weights, j)
        positions, weights = _quad(image, num_rows, axis, num_taps - 4, y)
        target = np.uintp(out.start + out.row_step * y)
        for i in range(num_bytes):
            j = np.uintp(i)
            total = np.int32(sums[j] + _dot(values, positions, weights, j))
            sums[j] = _HALF
            results[target + j] = _clip(total)


@compile_inner
def _copy_pixels(image: Image, num_rows: int, num_columns: int, out: Image) -> None:
    """Copies an image between layouts; each pixel has three bytes or four.

    Four are copied at once, as one number. The fourth means nothing: it belongs to the next pixel,
    which overwrites it; only the last pixel of a row has no next one.
    """
    values, results = image.values, out.values
    one, two, three = np.uintp(1), np.uintp(2), np.uintp(3)
    for row in range(num_rows):
        i = np.uintp(image.start + image.row_step * row)
        j = np.uintp(out.start + out.row_step * row)
        for _ in range(num_columns - 1):
            red, green, blue = values[i], values[i + one], values[i + two]
            neighbour = values[i + three]
            results[j], results[j + one], results[j + two] = red, green, blue
            results[j + three] = neighbour
            i += np.uintp(image.column_step)
            j += np.uintp(out.column_step)
        results[j] = values[i]
        results[j + one] = values[i + one]
        results[j + two] = values[i + two]


@compile_inner
def _resize_columns(
    image: Image, num_rows: int, num_columns: int, axis: Axis, out: Image, scratch: Scratch
) -> None:
    """Resizes the second axis of image [num_rows, num_columns], some rows at a time."""
    columns, results = scratch.columns, scratch.results
    for y in range(0, num_rows, _NUM_LANES):
        count = min(_NUM_LANES, num_rows - y)
        rows = Image(image.values, image.start + image.row_step * y, image.row_step, 3)
        _copy_pixels(rows, count, num_columns, Image(columns, 0, 4, _LANES_STEP))
        transposed = Image(columns, 0, _LANES_STEP, 4)
        resized = Image(results, 0, _LANES_STEP, 4)
        _resize_rows(transposed, num_columns, 4 * count, axis, resized, scratch.sums)
        target = Image(out.values, out.start + out.row_step * y, out.row_step, 3)
        _copy_pixels(Image(results, 0, 4, _LANES_STEP), count, len(axis[0]), target)


@compile_inner
def _axes(cut: Cut, bicubic: bool) -> tuple[Axis, Axis]:
    """Returns what makes the rows of a cut, and what makes its columns."""
    step = np.int64(1)  # a literal would compile everything twice
    rows, columns = (cut.offset[0], step, cut.size[0]), (cut.offset[1], step, cut.size[1])
    if cut.flip:
        columns = (cut.offset[1] + cut.size[1] - 1, -step, cut.size[1])
    axis_y = _axis_weights(cut.box[2], cut.shape[0], rows, bicubic)
    return axis_y, _axis_weights(cut.box[3], cut.shape[1], columns, bicubic)


@compile_inner
def resize(image: Image, cut: Cut, bicubic: bool, out: Image, scratch: Scratch) -> None:
    """Writes a cut of an image; the window lies within the resized image.

    Each pass rounds to 8 bits, so their order shows; the rule below is Pillow 13's, found by
    comparing pixels.
    """
    top, left, height, width = cut.box
    rows_first = height > cut.shape[0] and height - cut.shape[0] > 2 * (width - cut.shape[1])
    axis_y, axis_x = _axes(cut, bicubic)
    starts, weights = axis_y
    top += starts[0]  # rows above and below what is needed are left out
    num_rows = min(starts[-1] + len(weights), height) - starts[0]
    for i in range(len(starts) - 1, -1, -1):
        starts[i] -= starts[0]
    middle_rows, middle_columns = num_rows, cut.size[1]
    if rows_first:
        middle_rows, middle_columns = cut.size[0], width
    start = image.start + image.row_step * top + 3 * left
    source = Image(image.values, start, image.row_step, 3)
    middle = Image(scratch.middle, np.int64(0), 3 * middle_columns, 3)
    target = middle
    for is_first in (True, False):
        if is_first == rows_first:
            _resize_rows(source, num_rows, 3 * middle_columns, axis_y, target, scratch.sums)
        else:
            _resize_columns(source, middle_rows, width, axis_x, target, scratch)
        source, target = middle, out
