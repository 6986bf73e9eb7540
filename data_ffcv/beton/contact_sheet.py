"""One picture of many samples, to see at a glance what a ``.beton`` holds."""

import colorsys
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.info import BetonInfo
from data_ffcv.beton.layout import IGNORED, JPG
from data_ffcv.beton.verify import read_mask
from data_ffcv.errors import DataError

TILE = 128  # largest side of an image on the sheet, in pixels
GAP = 4
CAPTION = 16
_MARK = ("Software", "data_ffcv.inspect")  # what distinguishes a sheet from other pictures


def check_target(out: Path) -> None:
    """Raises DataError when the sheet cannot be written, or would replace something else."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise DataError(f"{out.parent} is not a folder one can write to; give --out or --no-sheet")
    if out.exists() and not _is_sheet(out):
        raise DataError(f"{out} exists and is no contact sheet; give another --out or --no-sheet")


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get(_MARK[0]) == _MARK[1]
    except OSError:
        return False


def write_sheet(info: BetonInfo, out: Path, num_images: int, seed: int) -> np.ndarray:
    """Writes a PNG of samples drawn without replacement; returns their rising indices.

    Images larger than a tile are shrunk, smaller ones enlarged by a whole factor. A mask lies
    over its image in its classes' colours; ignored pixels keep the image's.

    Raises:
        DataError: an image is corrupt, or the picture cannot be written.
    """
    count = min(num_images, info.num_samples)
    chosen = np.sort(np.random.default_rng(seed).choice(info.num_samples, count, replace=False))
    images = BetonImages(info)
    num_columns = math.ceil(math.sqrt(count))
    num_rows = math.ceil(count / num_columns)
    step_x, step_y = TILE + GAP, TILE + CAPTION + GAP
    sheet = Image.new("RGB", (num_columns * step_x + GAP, num_rows * step_y + GAP), "white")
    for place, index in enumerate(chosen.tolist()):
        row, column = divmod(place, num_columns)
        tile = _draw_tile(_read_pixels(info, images, index), _caption(info, images, index))
        sheet.paste(tile, (GAP + column * step_x, GAP + row * step_y))
    _save(sheet, out)
    return chosen


def _read_pixels(info: BetonInfo, images: BetonImages, index: int) -> np.ndarray:
    """Returns one image, with its mask over it, uint8 [height, width, 3]."""
    samples = info.samples
    if samples.modes[index] == JPG:
        pixels = images.decode(index)
    else:
        start, size = int(samples.pointers[index]), int(samples.num_bytes[index])
        shape = (int(samples.heights[index]), int(samples.widths[index]), 3)
        pixels = images.pixels[start : start + size].reshape(shape)
    if not info.has_masks:
        return pixels
    mask = read_mask(info, images, index)
    mixed = ((pixels.astype(np.uint16) + _palette()[mask]) // 2).astype(np.uint8)
    return np.where((mask == IGNORED)[..., None], pixels, mixed)


def _palette() -> np.ndarray:
    """Returns a colour for each class index, uint8 [256, 3]; neighbours differ in hue."""
    golden = (math.sqrt(5) - 1) / 2
    colours = [colorsys.hsv_to_rgb(index * golden % 1, 0.9, 1.0) for index in range(256)]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def _caption(info: BetonInfo, images: BetonImages, index: int) -> str:
    """Returns the sample's index and class, or its mask's classes, the largest first."""
    if info.labels is not None:
        return f"{index} {info.classes[info.labels[index]]}"
    counts = np.bincount(read_mask(info, images, index).ravel(), minlength=256)[: info.num_classes]
    largest = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return f"{index} " + ", ".join(info.classes[number] for number in largest)


def _draw_tile(pixels: np.ndarray, caption: str) -> Image.Image:
    """Returns a tile with the image, and its caption right below it."""
    image = Image.fromarray(pixels)
    if max(image.size) > TILE:
        image.thumbnail((TILE, TILE), Image.Resampling.BICUBIC)
    else:
        factor = TILE // max(image.size)
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    tile = Image.new("RGB", (TILE, TILE + CAPTION), "white")
    tile.paste(image, (0, TILE - image.height))
    font = ImageFont.load_default(size=11)
    ImageDraw.Draw(tile).text((0, TILE + 1), caption, fill="black", font=font)
    return tile


def _save(sheet: Image.Image, out: Path) -> None:
    mark = PngInfo()
    mark.add_text(*_MARK)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        sheet.save(temporary, format="PNG", pnginfo=mark)
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror}); give another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
