"""Compiled pixel work: random crop, antialiased resize and flip of each image and its mask.

Randomness is counter-based: every draw is a pure function of (seed, epoch, sample, view, number of
the draw). There is no generator state, so pixels do not depend on workers, ranks or a resume.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_ffcv.beton.layout import IGNORED
from data_ffcv.pixels import crops, resample
from data_ffcv.pixels.augmentation import KINDS, Augmentation, to_pair
from data_ffcv.pixels.compiling import compile_cached, compile_inner
from data_ffcv.pixels.crops import Box, Cut, Image, Pair, copy, cut_mask, fill
from data_ffcv.pixels.resample import make_scratch, resize

RANDOM_RESIZED_CROP, PAD_CROP, CENTER_CROP, RANDOM_SCALE_CROP = range(4)  # positions in `KINDS`
_NUM_WINDOWS = 10  # of random_scale_crop, until one has enough different classes


class Settings(NamedTuple):
    """An `Augmentation` as numbers, plus the stream's seed and the number of the view."""

    seed: np.uint64
    view: int
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
    max_class_ratio: float
    fill: tuple[int, int, int]  # colour outside of the image


def to_settings(
    augmentation: Augmentation, seed: int, view: int = 0, fill: tuple[int, int, int] = (0, 0, 0)
) -> Settings:
    """Returns an augmentation as `Settings`.

    Args:
        augmentation: What is done to each image.
        seed: 64 bits that decide all draws, with each call's epoch and samples.
        view: Number of the view of the same sample; each has its own draws.
        fill: Colour, 0-255, of what ``random_scale_crop`` finds outside of the image.
    """
    return Settings(
        seed=np.uint64(seed),
        view=view,
        kind=KINDS.index(augmentation.kind),
        image_size=(augmentation.height, augmentation.width),
        scale_low=float(augmentation.scale[0]),
        scale_high=float(augmentation.scale[1]),
        ratio_low=float(augmentation.ratio[0]),
        ratio_high=float(augmentation.ratio[1]),
        padding=augmentation.padding,
        flip=augmentation.flip,
        bicubic=augmentation.interpolation == "bicubic",
        resize=to_pair(augmentation.resize or 0),
        max_class_ratio=float(augmentation.max_class_ratio),
        fill=fill if augmentation.kind == "random_scale_crop" else (0, 0, 0),
    )


@compile_inner
def _mix(x: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele et al. 2014): a bijection of 64 bits that avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compile_inner
def _sample_key(settings: Settings, epoch: int, sample: int) -> np.uint64:
    key = _mix(_mix(_mix(settings.seed) + np.uint64(epoch)) + np.uint64(sample))
    view = settings[1]  # numba takes the field's name for numpy's method
    # A large odd number, because key + view might be what another sample's key is made of.
    return _mix(key + np.uint64(view) * np.uint64(0xD1342543DE82EF95)) if view > 0 else key


@compile_inner
def _uniform(key: np.uint64, draw: int) -> float:
    """Returns draw number `draw` of a sample, in [0, 1)."""
    bits = _mix(key + np.uint64(draw + 1) * np.uint64(0x9E3779B97F4A7C15))
    return float(bits >> np.uint64(11)) * 2.0**-53


@compile_inner
def _randint(key: np.uint64, draw: int, high: int) -> int:
    """Returns an integer in [0, high]."""
    return int(_uniform(key, draw) * (high + 1))


@compile_inner
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


@compile_inner
def _resized_shape(height: int, width: int, target: Pair) -> Pair:
    """Smallest shape of the image's aspect that covers `target`; (0, 0) changes nothing.

    For a square target the shorter side becomes its side; rounds down, as torchvision's Resize.
    """
    if target == (0, 0):
        return height, width
    if target[1] * height <= target[0] * width:
        return target[0], int(target[0] * width / height)
    return int(target[1] * height / width), target[1]


@compile_inner
def _scaled_shape(key: np.uint64, height: int, width: int, settings: Settings) -> Pair:
    """Shape of the whole image after ``random_scale_crop`` has applied its random factor."""
    factor = settings.scale_low + _uniform(key, 1) * (settings.scale_high - settings.scale_low)
    if settings.resize != (0, 0):
        factor *= max(settings.resize[0] / height, settings.resize[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


@compile_inner
def _draw_cut(
    key: np.uint64, attempt: int, height: int, width: int, flip: bool, settings: Settings
) -> Cut:
    """Draws where an image is cut; `attempt` counts the windows of ``random_scale_crop``."""
    size = settings.image_size
    box, shape = (0, 0, height, width), (height, width)
    if settings.kind == RANDOM_RESIZED_CROP:
        return Cut(_random_box(key, height, width, settings), size, (0, 0), size, flip)
    if settings.kind == PAD_CROP:
        padding = settings.padding
        top = _randint(key, 1, height + 2 * padding - size[0]) - padding
        left = _randint(key, 2, width + 2 * padding - size[1]) - padding
        return Cut(box, shape, (top, left), size, flip)
    if settings.kind == CENTER_CROP:
        shape = _resized_shape(height, width, settings.resize)
        offset = (round((shape[0] - size[0]) / 2), round((shape[1] - size[1]) / 2))
        return Cut(box, shape, offset, size, flip)
    shape = _scaled_shape(key, height, width, settings)
    size = (min(size[0], shape[0]), min(size[1], shape[1]))
    top = _randint(key, 2 + 2 * attempt, shape[0] - size[0])
    left = _randint(key, 3 + 2 * attempt, shape[1] - size[1])
    return Cut(box, shape, (top, left), size, flip)


@compile_inner
def _is_varied(mask: Image, shape: Pair, max_class_ratio: float) -> bool:
    """Whether a mask has labels, and no class more of them than `max_class_ratio`."""
    counts = np.zeros(256, np.int64)
    values = mask.values
    for i in range(shape[0] * shape[1]):
        counts[values[np.uintp(mask.start + i)]] += 1
    largest, total = 0, 0
    for number in range(IGNORED):
        largest, total = max(largest, counts[number]), total + counts[number]
    return 0 < largest <= max_class_ratio * total


@compile_inner
def _cut_with_mask(
    key: np.uint64, shape: Pair, settings: Settings, mask: Image, has_mask: bool, out: Image
) -> Cut:
    """Draws a cut of an image of `shape` and writes the mask's part of it."""
    flip = settings.flip and _uniform(key, 0) < 0.5
    num_windows = _NUM_WINDOWS if has_mask and settings.max_class_ratio < 1 else 1
    for attempt in range(num_windows):
        cut = _draw_cut(key, attempt, shape[0], shape[1], flip, settings)
        if has_mask:
            cut_mask(mask, cut, settings.image_size, out)
        is_last = attempt == num_windows - 1
        if is_last or _is_varied(out, settings.image_size, settings.max_class_ratio):
            break
    return cut


def _make_augment_images(sources: int) -> Callable[..., None]:
    def augment_images(
        pixels: np.ndarray,
        masks: np.ndarray,
        table: np.ndarray,
        epoch: int,
        settings: Settings,
        out: np.ndarray,
        out_masks: np.ndarray,
    ) -> None:  # as below
        sources  # noqa: B018  # see compile_cached
        values, mask_values = out.reshape(-1), out_masks.reshape(-1)
        num_rows, num_columns = settings.image_size
        scratch = make_scratch(table, settings.image_size)
        for n in range(len(table)):
            start, mask_start, height, width = table[n, 1], table[n, 2], table[n, 3], table[n, 4]
            key = _sample_key(settings, epoch, table[n, 0])
            mask = Image(masks, mask_start, width, 1)
            out_mask = Image(mask_values, n * num_rows * num_columns, num_columns, 1)
            cut = _cut_with_mask(key, (height, width), settings, mask, mask_start >= 0, out_mask)
            image = Image(pixels, start, 3 * width, 3)
            target = Image(values, 3 * n * num_rows * num_columns, 3 * num_columns, 3)
            if cut.size != settings.image_size or settings.kind == PAD_CROP:
                fill(settings.fill, settings.image_size, target)
            if (cut.box[2], cut.box[3]) == cut.shape:
                copy(image, cut, target)
            else:
                resize(image, cut, settings.bicubic, target, scratch)

    return augment_images


_augment_images = compile_cached(_make_augment_images, __file__, crops.__file__, resample.__file__)


class _Writable:
    """Calls a read-only array writable, because numba would compile all for both kinds."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array  # the memory lives as long as this


def augment_images(
    pixels: np.ndarray,
    masks: np.ndarray,
    table: np.ndarray,
    epoch: int,
    settings: Settings,
    out: np.ndarray,
    out_masks: np.ndarray,
) -> None:
    """Augments a run of images; other threads run meanwhile.

    Args:
        pixels: uint8 [bytes], where the RGB images are: a mapped file, or one decoded image.
        masks: uint8 [bytes], where their masks are; may be empty.
        table: int64 [n, 5]: index of the sample, position of its pixels in `pixels`, position of
            its mask in `masks` or -1, height, width.
        epoch: Decides the random draws, with the seed and each sample's index.
        settings: The augmentation.
        out: Overwritten, uint8 [n, *image_size, 3].
        out_masks: Overwritten, uint8 [n, *image_size]; [0, 0, 0] where there are no masks.
    """
    pixels, masks = np.asarray(_Writable(pixels)), np.asarray(_Writable(masks))
    _augment_images(pixels, masks, table, epoch, settings, out, out_masks)
