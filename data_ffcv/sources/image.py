"""Reading any image as 8-bit RGB, and saying what had to be done for it."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from data_ffcv.errors import DataError

# Formats of photographs only: Pillow would also run Ghostscript for an EPS file.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")


def read_image(file: str | Path | bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Reads one image as RGB with 8 bits per channel.

    The content decides about the format, not the suffix. Colour profiles are ignored, transparency
    is dropped (the colours below it remain, as Pillow's ``convert``), 16-bit channels keep their
    high byte, of several frames the first is taken, and the EXIF orientation is applied.

    Args:
        file: A path, or the content of a file.

    Returns:
        The image, and what was done to it if it was an odd one.

    Raises:
        DataError: the image cannot be read. The sentence does not name it: the caller does.
        OSError: the file cannot be opened.
    """
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    with open_image(content) as image:
        return _to_rgb(image, content)


def read_size(path: str | Path) -> tuple[int, int]:
    """Returns the height and width that `read_image` would give, from the file's header alone."""
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        # Pillow has turned a TIFF's size already.
        is_turned = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if is_turned else (height, width)


@contextmanager
def open_image(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """Opens an image with Pillow; whatever goes wrong with it in the block is a DataError."""
    if not content:
        raise DataError("the file is empty; get it again")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.format == "PNG":  # decoding leaves the checksums out
                Image.open(io.BytesIO(content), formats=["PNG"]).verify()
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"this is no image of a known format ({', '.join(_FORMATS)}); convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where it is None nothing is refused
        raise DataError(
            f"the image has more than {limit} pixels, which may be an attack "
            "on memory; shrink or remove it"
        ) from error
    # Pillow's readers raise whatever they meet in a damaged file.
    except Exception as error:
        raise DataError(f"the image is damaged or truncated ({error}); get it again") from error


def _to_rgb(image: ImageFile.ImageFile, content: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    notes: list[str] = []
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("first of several frames")  # an MPO's others are previews of the first
    # Once the pixels are decoded nothing tells 16-bit colour from 8-bit colour.
    if image.mode.startswith("I") or any(";16" in str(tile.args) for tile in image.tile):
        notes.append("16 bits to 8")
    orientation = _orientation(image)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        # The same pixels as Pillow's, but damage is an error instead of a guess.
        pixels = Image.fromarray(simplejpeg.decode_jpeg(content, "RGB"))
    else:
        pixels, note = _convert(image)
        notes += note
    if orientation != 1:
        notes.append("EXIF rotation")
        if image.format != "TIFF":  # Pillow has turned that one
            pixels.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(pixels, in_place=True)
    return pixels, tuple(notes)


def _orientation(image: Image.Image) -> int:
    """Returns how to turn the image (EXIF 2.32, section 4.6.4); 1 is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged notes beside a sound picture
        return 1
    return orientation if orientation in range(2, 9) else 1


def _convert(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Returns what Pillow decodes as RGB, and what was done for it."""
    mode = image.mode
    notes: list[str] = []
    if mode == "F" or (mode == "I" and image.format not in ("PNG", "PPM")) or mode == "LAB":
        raise DataError(
            f"the image has pixels of mode {mode}, whose range is not known; convert it to RGB "
            "with 8 bits per channel"
        )
    if mode.startswith("I"):  # Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB"), notes
    if mode in ("P", "PA", "CMYK"):
        notes.append("palette to RGB" if mode != "CMYK" else "CMYK to RGB")
    transparent = image.info.pop("transparency", None) is not None  # convert warns about it
    if transparent or mode.endswith(("A", "a")):
        notes.append("transparency dropped")
    return image.convert("RGB"), notes
