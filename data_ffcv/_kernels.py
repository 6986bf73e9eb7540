"""Compiled pixel work: decode, crop, antialiased resize and flip of each image in one pass.

Everything that shapes the compiled code is in this file, because numba's disk cache notices
changes of one file only. A fresh machine compiles once; later processes load it in milliseconds.

Randomness is counter-based: every draw is a pure function of (seed, epoch, sample, number of the
draw). There is no generator state, so pixels do not depend on workers, ranks or a resume.
"""

import ctypes
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding
import numpy as np
from numba import njit, types

from data_ffcv._ffcv import ctypes_imdecode

logger = logging.getLogger(__name__)

# FFCV's libjpeg-turbo wrapper by symbol name: compiled code that held its address instead
# could not be cached on disk. Arguments: source address and bytes, source height and width,
# destination address, crop height and width, offsets x and y, scale num/denom, crop?, flip?.
llvmlite.binding.add_symbol(
    "data_ffcv_imdecode", ctypes.cast(ctypes_imdecode, ctypes.c_void_p).value
)
_u32, _u64 = types.uint32, types.uint64
_imdecode = types.ExternalFunction(
    "data_ffcv_imdecode", types.int32(_u64, _u64, _u32, _u32, _u64, *([_u32] * 8))
)

# Pillow's fixed point: weights have 22 fractional bits, each pass rounds to 8 bits.
_BITS = 22
_HALF = 1 << (_BITS - 1)

JPG, RAW = 0, 1  # FFCV's image modes
RANDOM_RESIZED_CROP, PAD_CROP, CENTER_CROP = 0, 1, 2  # in the order of augment.KINDS

Image = np.ndarray  # uint8 [height, width, 3]
Pair = tuple[int, int]  # (vertical, horizontal)
Box = tuple[int, int, int, int]  # top, left, height, width
Axis = tuple[np.ndarray, np.ndarray, np.ndarray]  # what _axis_weights returns


class Settings(NamedTuple):
    """An `Augmentation` as numbers, plus the stream's seed."""

    seed: np.uint64
    kind: int
    image_size: Pair
    scale_low: float
    scale_high: float
    ratio_low: float
    ratio_high: float
    padding: int
    flip: bool
    bicubic: bool
    resize: Pair  # to be covered; (0, 0): keep the size


_compile = njit(nogil=True, error_model="numpy")


def _compile_cached(function: Callable) -> Callable:
    """Compiles an entry point, with all it calls, and keeps the code on disk."""
    try:
        return njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder can be written.
        logger.warning("set NUMBA_CACHE_DIR to a writable folder to start streams faster")
        return _compile(function)


@_compile
def _mix(x: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64 bits that avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def _sample_key(seed: np.uint64, epoch: int, sample: int) -> np.uint64:
    return _mix(_mix(_mix(seed) + np.uint64(epoch)) + np.uint64(sample))


@_compile
def _uniform(key: np.uint64, draw: int) -> float:
    """Returns draw number `draw` of a sample, in [0, 1)."""
    bits = _mix(key + np.uint64(draw + 1) * np.uint64(0x9E3779B97F4A7C15))
    return float(bits >> np.uint64(11)) * 2.0**-53


@_compile
def _randint(key: np.uint64, draw: int, high: int) -> int:
    """Returns an integer in [0, high]."""
    return int(_uniform(key, draw) * (high + 1))


@_compile
def _random_box(key: np.uint64, height: int, width: int, settings: Settings) -> Box:
    """Random crop (top, left, height, width), as torchvision's RandomResizedCrop draws it."""
    log_low, log_high = math.log(settings.ratio_low), math.log(settings.ratio_high)
    for attempt in range(10):
        draw = 1 + 4 * attempt
        share = settings.scale_low + _uniform(key, draw) * (
            settings.scale_high - settings.scale_low
        )
        ratio = math.exp(log_low + _uniform(key, draw + 1) * (log_high - log_low))
        box_width = round(math.sqrt(height * width * share * ratio))
        box_height = round(math.sqrt(height * width * share / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = _randint(key, draw + 2, height - box_height)
            left = _randint(key, draw + 3, width - box_width)
            return top, left, box_height, box_width
    box_height = max(1, min(height, round(width / settings.ratio_low)))
    box_width = max(1, min(width, round(height * settings.ratio_high)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@_compile
def _resized_shape(height: int, width: int, target: Pair) -> Pair:
    """Smallest shape of the image's aspect that covers `target`; (0, 0) changes nothing.

    For a square target the shorter side becomes its side; rounds down, as torchvision's Resize.
    """
    if target == (0, 0):
        return height, width
    if target[1] * height <= target[0] * width:
        return target[0], int(target[0] * width / height)
    return int(target[1] * height / width), target[1]


@_compile
def _cubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5, which Pillow uses."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@_compile
def _axis_weights(in_size: int, out_size: int, first: int, count: int, bicubic: bool) -> Axis:
    """Weights that make output pixels first ... first + count - 1 of one resized axis.

    Returns (starts [count], num_taps [count], weights [count, max_taps] in fixed point).
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    starts = np.empty(count, np.int64)
    num_taps = np.empty(count, np.int64)
    weights = np.empty((count, math.ceil(4.0 * stretch) + 2), np.int32)
    taps = np.empty(weights.shape[1], np.float64)
    for i in range(count):
        low, high = (first + i) * scale, (first + i + 1) * scale
        if bicubic:
            center = (low + high) / 2
            start = max(int(center - 2.0 * stretch + 0.5), 0)
            end = min(int(center + 2.0 * stretch + 0.5), in_size)
        else:
            start = min(int(low), in_size - 1)
            end = min(max(math.ceil(high), start + 1), in_size)
        total = 0.0
        for k in range(end - start):
            pixel = start + k
            if bicubic:
                taps[k] = _cubic((pixel - center + 0.5) / stretch)
            else:
                taps[k] = max(min(pixel + 1.0, high) - max(float(pixel), low), 0.0)
            total += taps[k]
        starts[i], num_taps[i] = start, end - start
        for k in range(end - start):
            weights[i, k] = math.floor(taps[k] / total * (1 << _BITS) + 0.5)
    return starts, num_taps, weights


@_compile
def _clip(fixed_point: int) -> np.uint8:
    return np.uint8(min(max(fixed_point >> _BITS, 0), 255))


@_compile
def _horizontal(image: Image, corner: Pair, axis: Axis, flip: bool, out: Image) -> None:
    """Resizes the rows below `corner` (top, left) into out [num_rows, size, 3]."""
    top, left = corner
    starts, num_taps, weights = axis
    num_rows, size, _ = out.shape
    for y in range(num_rows):
        source = image[top + y]
        for x in range(size):
            red, green, blue = _HALF, _HALF, _HALF
            for k in range(num_taps[x]):
                weight = weights[x, k]
                column = left + starts[x] + k
                red += weight * source[column, 0]
                green += weight * source[column, 1]
                blue += weight * source[column, 2]
            target = size - 1 - x if flip else x
            out[y, target, 0] = _clip(red)
            out[y, target, 1] = _clip(green)
            out[y, target, 2] = _clip(blue)


@_compile
def _vertical(image: Image, corner: Pair, axis: Axis, out: Image) -> None:
    """Resizes the columns right of `corner` (top, left) into out [size, num_columns, 3]."""
    top, left = corner
    starts, num_taps, weights = axis
    size, num_columns, _ = out.shape
    sums = np.empty(3 * num_columns, np.int32)
    for y in range(size):
        for i in range(sums.shape[0]):
            sums[i] = _HALF
        for k in range(num_taps[y]):
            weight = weights[y, k]
            row = image[top + starts[y] + k].reshape(-1)[3 * left :]
            for i in range(sums.shape[0]):
                sums[i] += weight * np.int32(row[i])
        target = out[y].reshape(-1)
        for i in range(sums.shape[0]):
            target[i] = _clip(sums[i])


@_compile
def _resize(
    image: Image, box: Box, shape: Pair, offset: Pair, flip: bool, bicubic: bool, out: Image
) -> None:
    """Resizes image[box] to `shape` and writes the part at `offset`, perhaps mirrored.

    Each pass rounds to 8 bits, so their order shows; the rule below is Pillow 13's, found by
    comparing pixels.
    """
    top, left, height, width = box
    out_height, out_width, _ = out.shape
    origin = (np.int64(0), np.int64(0))  # literal zeros would compile both passes twice
    axis_y = _axis_weights(height, shape[0], offset[0], out_height, bicubic)
    axis_x = _axis_weights(width, shape[1], offset[1], out_width, bicubic)
    if height > shape[0] and height - shape[0] > 2 * (width - shape[1]):
        middle = np.empty((out_height, width, 3), np.uint8)
        _vertical(image, (top, left), axis_y, middle)
        _horizontal(middle, origin, axis_x, flip, out)
    else:
        starts, num_taps, weights = axis_y
        first, end = starts[0], starts[-1] + num_taps[-1]
        middle = np.empty((end - first, out_width, 3), np.uint8)
        _horizontal(image, (top + first, left), axis_x, flip, middle)
        _vertical(middle, origin, (starts - first, num_taps, weights), out)


@_compile
def _copy(image: Image, top: int, left: int, flip: bool, out: Image) -> None:
    """Copies the part at (top, left); what lies outside the image is black."""
    height, width, _ = image.shape
    out_height, out_width, _ = out.shape
    for y in range(out_height):
        for x in range(out_width):
            row, column = top + y, left + x
            target = out_width - 1 - x if flip else x
            inside = 0 <= row < height and 0 <= column < width
            for channel in range(3):
                out[y, target, channel] = image[row, column, channel] if inside else 0


@_compile
def _augment(image: Image, key: np.uint64, settings: Settings, out: Image) -> None:
    height, width, _ = image.shape
    out_height, out_width = settings.image_size
    flip = settings.flip and _uniform(key, 0) < 0.5
    if settings.kind == PAD_CROP:
        padding = settings.padding
        top = _randint(key, 1, height + 2 * padding - out_height) - padding
        left = _randint(key, 2, width + 2 * padding - out_width) - padding
        _copy(image, top, left, flip, out)
        return
    if settings.kind == RANDOM_RESIZED_CROP:
        box, offset = _random_box(key, height, width, settings), (0, 0)
        shape = (out_height, out_width)
    else:
        box = (0, 0, height, width)
        shape = _resized_shape(height, width, settings.resize)
        offset = (round((shape[0] - out_height) / 2), round((shape[1] - out_width) / 2))
    if (box[2], box[3]) == shape:
        _copy(image, box[0] + offset[0], box[1] + offset[1], flip, out)
    else:
        _resize(image, box, shape, offset, flip, settings.bicubic, out)


@_compile_cached
def decode_images(
    file: np.ndarray,
    table: np.ndarray,
    epoch: int,
    settings: Settings,
    scratch: np.ndarray,
    out: np.ndarray,
) -> int:
    """Decodes and augments a run of images into `out`, uint8 [n, *image_size, 3].

    Args:
        file: The whole file, uint8.
        table: int64 [n, 6]: index in the file, position and length of the data in bytes, JPG or
            RAW, height, width.
        epoch: Decides the random draws, with the seed and each image's index.
        settings: The augmentation.
        scratch: uint8, room for the largest image of the run.
        out: Overwritten.

    Returns:
        Position of the first image whose JPEG data is corrupt, or -1.
    """
    for n in range(len(table)):
        start, num_bytes, height, width = table[n, 1], table[n, 2], table[n, 4], table[n, 5]
        source = file[start : start + num_bytes]
        if table[n, 3] == JPG:
            # The wrapper is told not to crop, scale or flip; it returns libjpeg-turbo's code.
            code = _imdecode(
                source.ctypes.data, num_bytes, height, width, scratch.ctypes.data,
                height, width, 0, 0, 1, 1, 0, 0,
            )  # fmt: skip
            if code != 0:
                return n
        else:
            # A slice assignment would add two seconds of compilation.
            for i in range(num_bytes):
                scratch[i] = source[i]
        image = scratch[: 3 * height * width].reshape(height, width, 3)
        _augment(image, _sample_key(settings.seed, epoch, table[n, 0]), settings, out[n])
    return -1
