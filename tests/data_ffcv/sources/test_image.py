"""Every odd image becomes the RGB pixels it was written with, or a sentence."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_ffcv import DataError
from data_ffcv.sources import read_image, read_size
from tests.data_ffcv.sources.images import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    encode,
    png,
    random_pixels,
    smooth_image,
)

PIXELS = random_pixels(5, 7)


def read(content: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    image, notes = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image), notes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"optimize": True, "quality": 100},
        *({"subsampling": subsampling} for subsampling in (0, 1, 2)),
        {"keep_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (64, 48), (101, 67)], ids=str)
def test_jpeg_is_what_pillow_decodes(options: dict, size: tuple[int, int]):
    for mode in ("RGB", "L"):
        if mode == "L" and "keep_rgb" in options:
            continue
        content = encode(smooth_image().convert(mode).resize(size), "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        pixels, notes = read(content)
        assert np.array_equal(pixels, expected) and notes == ()


def test_grey_two_colours_and_alpha():
    grey = PIXELS[..., 0]
    bits = grey > 127
    alpha = Image.fromarray(np.dstack([PIXELS, grey]))
    cases = [
        (Image.fromarray(grey), np.dstack([grey] * 3), ()),
        (Image.fromarray(bits), np.dstack([bits * np.uint8(255)] * 3), ()),
        (alpha, PIXELS, ("transparency dropped",)),
        (
            Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey[::-1].copy())]),
            np.dstack([grey] * 3),
            ("transparency dropped",),
        ),
    ]
    for image, expected, expected_notes in cases:
        pixels, notes = read(encode(image, "PNG"))
        assert np.array_equal(pixels, expected) and notes == expected_notes
    pixels, notes = read(encode(alpha, "WEBP", lossless=True, exact=True))
    assert np.array_equal(pixels, PIXELS) and notes == ("transparency dropped",)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(100, 116))])
def test_palette_gives_its_colours_also_where_it_is_transparent(transparency: int | bytes | None):
    palette = random_pixels(16, 3, channels=1, seed=1)
    indices = PIXELS[..., 0] % 16
    image = Image.frombytes("P", (7, 5), indices.tobytes())
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    pixels, notes = read(encode(image, "PNG", **options))
    assert np.array_equal(pixels, palette[indices])
    dropped = ("transparency dropped",) if transparency is not None else ()
    assert notes == ("palette to RGB", *dropped)


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 100, 0, 51), (204, 124, 204)),
    ],
)
def test_cmyk_and_ycck_as_adobe_writes_them(cmyk: tuple[int, ...], rgb: tuple[int, ...]):
    plain = Image.new("CMYK", (16, 16), cmyk)
    # YCCK keeps the inverse of inverted CMY as YCbCr (libjpeg, jdcolor.c); Pillow inverts again.
    luma = Image.new("RGB", (16, 16), cmyk[:3]).convert("YCbCr")
    black = Image.new("L", (16, 16), 255 - cmyk[3])
    stored = Image.merge("CMYK", [*luma.split(), black])
    ycck = bytearray(encode(stored.point(lambda value: 255 - value), "JPEG", quality=100))
    ycck[ycck.index(b"Adobe") + 11] = 2
    for content in (
        encode(plain, "TIFF"),
        encode(plain, "JPEG", quality=100),
        bytes(ycck),
    ):
        pixels, notes = read(content)
        assert np.abs(pixels.astype(int) - rgb).max() <= 3
        assert notes == ("CMYK to RGB",)


def test_sixteen_bits_keep_the_high_byte():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(">u2")
    grey = np.dstack([(values[..., 0] >> 8).astype(np.uint8)] * 3)
    colour = (values[..., :3] >> 8).astype(np.uint8)
    rows = {depth: [row.tobytes() for row in values[..., :depth]] for depth in (1, 3, 4)}
    native = Image.fromarray(values[..., 0].astype(np.uint16))
    cases = [
        (png(rows[1], 7, 16, GREY), grey, ()),
        (png(rows[3], 7, 16, COLOUR), colour, ()),
        (png(rows[4], 7, 16, COLOUR_ALPHA), colour, ("transparency dropped",)),
        (encode(native, "TIFF"), grey, ()),
        (b"P5 7 5 65535\n" + values[..., 0].tobytes(), grey, ()),
    ]
    for content, expected, more in cases:
        pixels, notes = read(content)
        assert np.array_equal(pixels, expected)
        assert notes == ("16 bits to 8", *more)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(format: str):
    source = smooth_image(24, 40)
    options = {"lossless": True} if format == "WEBP" else {}
    upright, _ = read(encode(source, format, **options))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright),
        9: upright,
    }
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels, notes = read(encode(source, format, exif=exif, **options))
        assert np.array_equal(pixels, expected), orientation
        assert notes == (("EXIF rotation",) if orientation in range(2, 9) else ())


def test_damaged_exif_and_colour_profile_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    content = encode(
        Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff", icc_profile=profile
    )
    pixels, notes = read(content)
    assert np.array_equal(pixels, PIXELS) and notes == ()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_of_several_frames(format: str):
    first, second = Image.new("RGB", (8, 8), (10, 200, 30)), Image.new("RGB", (8, 8), (90, 0, 0))
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(first, format, save_all=True, append_images=[second], **options)
    pixels, notes = read(content)
    assert (pixels == (10, 200, 30)).all()
    assert notes[0] == "first of several frames"


def test_camera_preview_behind_the_image_is_no_oddity():
    images = [smooth_image(), smooth_image(30, 40)]
    content = encode(images[0], "MPO", save_all=True, append_images=images[1:])
    pixels, notes = read(content)
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)))) and notes == ()


def test_content_decides_and_not_the_suffix(tmp_path: Path):
    path = tmp_path / "n02105855_2933.JPEG"
    Image.fromarray(PIXELS).save(path, "PNG")
    image, notes = read_image(path)
    assert np.array_equal(image, PIXELS) and notes == ()


JPEG = encode(smooth_image(), "JPEG")
PNG = encode(Image.fromarray(random_pixels(20, 20)), "PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello" * 100, "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:30], "damaged|no image"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:500] + b"\xff\x00\xff" + PNG[503:], "damaged"),
        (encode(smooth_image(), "GIF")[:900], "truncated"),
        (encode(smooth_image(), "WEBP")[:200], "damaged"),
        (encode(smooth_image(), "TIFF")[:2000], "damaged"),
        (png([b"\0" * 60000], 20000, 8, COLOUR, height=20000), "attack on memory"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F"),
        (encode(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "mode I"),
    ],
    ids=range(13),
)
def test_unreadable_image_gives_one_sentence(content: bytes, words: str):
    with pytest.raises(DataError, match=words) as caught:
        read_image(content)
    assert "\n" not in str(caught.value)


def test_jpeg_damage_that_pillow_passes_is_noticed():
    content = JPEG[: len(JPEG) * 2 // 3] + b"\xff\xd9"  # the end mark too early
    Image.open(io.BytesIO(content)).load()
    with pytest.raises(DataError, match="damaged"):
        read_image(content)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_tells_the_size_that_reading_gives(
    tmp_path: Path, suffix: str, orientation: int
):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (48, 20)).save(path, exif=exif)
    image, _ = read_image(path)
    assert read_size(path) == (image.height, image.width)
