"""Image and mask pairs: values, numbering and every way in which they may not fit."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError
from data_ffcv.sources import open_source
from tests.data_ffcv.sources.images import GREY, encode, png, random_pixels, save, smooth_image

SIZE = (6, 8)


def random_mask(seed: int, values: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), SIZE)


def write_pairs(root: Path, masks: dict[str, np.ndarray]) -> None:
    """Keys are NAME or PART/NAME."""
    for number, (name, mask) in enumerate(masks.items()):
        save(root / "images" / f"{name}.PNG", random_pixels(*SIZE, seed=number))
        save(root / "annotations" / f"{name}.png", mask)


def test_parts_in_sorted_order(tmp_path: Path):
    masks = {
        f"{part}/{n}": random_mask(n, [0, 1, 4, 255]) for part in ("train", "val") for n in (3, 1)
    }
    write_pairs(tmp_path, masks)
    source = open_source("segmentation", tmp_path, part="val")
    assert source.labels is None and source.classes == tuple("01234") and len(source) == 2
    for index, number, seed in ((0, 1, 3), (1, 3, 2)):
        sample = source.read(index)
        assert source.name(index) == str(tmp_path / "images" / "val" / f"{number}.PNG")
        assert np.array_equal(sample.image, random_pixels(*SIZE, seed=seed))
        assert sample.mask.mode == "L" and np.array_equal(sample.mask, masks[f"val/{number}"])


@pytest.mark.parametrize(
    ("ignore_index", "expected", "num_classes"),
    [
        (None, {0: 0, 1: 1, 11: 11, 12: 12, 255: 255}, 13),
        (0, {0: 255, 1: 0, 11: 10, 12: 11, 255: 255}, 12),
        (11, {0: 0, 1: 1, 11: 255, 12: 11, 255: 255}, 12),
        (255, {0: 0, 1: 1, 11: 11, 12: 12, 255: 255}, 13),
    ],
)
def test_ignore_index(tmp_path: Path, ignore_index: int | None, expected: dict, num_classes: int):
    mask = random_mask(0, list(expected))
    write_pairs(tmp_path, {"a": mask, "b": random_mask(1, [0, 255])})
    source = open_source("segmentation", tmp_path, ignore_index=ignore_index)
    assert len(source.classes) == num_classes
    values = np.asarray(source.read(0).mask)
    for value, number in expected.items():
        assert (mask == value).any() and (values[mask == value] == number).all()


def test_largest_value_254_and_masks_without_any_class(tmp_path: Path):
    write_pairs(tmp_path, {"a": random_mask(0, [254]), "b": random_mask(0, [255])})
    assert len(open_source("segmentation", tmp_path).classes) == 255
    write_pairs(tmp_path, {"a": random_mask(0, [255])})
    with pytest.raises(DataError, match="no class"):
        open_source("segmentation", tmp_path)


def test_every_kind_of_index_image(tmp_path: Path):
    mask = random_mask(0, [0, 1, 2, 3])
    palette = Image.frombytes("P", SIZE[::-1], mask.tobytes())
    palette.putpalette(random_pixels(4, 3, channels=1).tobytes())
    two_bits = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -2:]).tobytes() for row in mask]
    four_bits = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, -4:]).tobytes() for row in mask]
    bits = Image.fromarray(mask > 1)
    contents = {
        "palette": (encode(palette, "PNG"), mask),
        "gif": (encode(palette, "GIF"), mask),
        "two": (png(two_bits, SIZE[1], 2, GREY), mask),
        "four": (png(four_bits, SIZE[1], 4, GREY), mask),
        "one": (encode(bits, "PNG"), mask > 1),
        "sixteen": (encode(Image.fromarray(mask.astype(np.uint16)), "PNG"), mask),
        "integers": (encode(Image.fromarray(mask.astype(np.int32)), "TIFF"), mask),
    }
    write_pairs(tmp_path, dict.fromkeys(contents, mask))
    for name, (content, _) in contents.items():
        (tmp_path / "annotations" / f"{name}.png").write_bytes(content)
    source = open_source("segmentation", tmp_path)
    for index, name in enumerate(sorted(contents)):
        assert np.array_equal(source.read(index).mask, contents[name][1]), name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            encode(Image.fromarray(random_pixels(*SIZE)), "PNG"),
            "holds colours .mode RGB.*mode L or P",
        ),
        (encode(Image.fromarray(random_pixels(*SIZE, 4)), "PNG"), "holds colours .mode RGBA"),
        (encode(Image.fromarray(random_mask(0, [0, 1])), "JPEG"), "JPEG alters values"),
        (encode(Image.fromarray(np.full(SIZE, 300, np.uint16)), "PNG"), "holds the value 300"),
        (encode(Image.fromarray(np.full(SIZE, -1, np.int32)), "TIFF"), "holds the value -1"),
        (encode(Image.fromarray(random_pixels(*SIZE, 1)), "PNG")[:60], "is damaged"),
        (b"text", "no image of a known format"),
        (b"P5 8 6 20\n" + bytes(48), "PPM alters values"),
    ],
)
def test_wrong_mask_is_named(tmp_path: Path, content: bytes, words: str):
    write_pairs(tmp_path, {"a": random_mask(0, [0]), "b": random_mask(0, [0])})
    (tmp_path / "annotations" / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"mask .*annotations/b\.png cannot be used: .*{words}"):
        open_source("segmentation", tmp_path)
    (tmp_path / "classes").write_text("sky\n")
    with pytest.raises(DataError, match=rf"mask .*annotations/b\.png cannot be used: .*{words}"):
        open_source("segmentation", tmp_path, classes=tmp_path / "classes").read(1)


def test_class_names_bound_the_values(tmp_path: Path):
    write_pairs(tmp_path, {"a": random_mask(0, [0, 1, 2, 255]), "b": random_mask(0, [0, 1, 3])})
    (tmp_path / "classes").write_text("sky\nroad sign\n")
    settings = {"classes": tmp_path / "classes", "ignore_index": 0}
    source = open_source("segmentation", tmp_path, **settings)
    assert source.classes == ("sky", "road sign")
    assert set(np.unique(source.read(0).mask)) == {0, 1, 255}
    with pytest.raises(DataError, match=r"annotations/b\.png holds the value 3, but .* 2 classes"):
        source.read(1)


def test_size_must_be_the_images_after_its_rotation(tmp_path: Path):
    write_pairs(tmp_path, {"a": random_mask(0, [0, 1]), "b": random_mask(0, [0, 1])})
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth_image(*SIZE).save(tmp_path / "images" / "a.PNG", exif=exif)
    smooth_image(*SIZE[::-1]).save(tmp_path / "images" / "b.PNG", exif=exif)
    source = open_source("segmentation", tmp_path)
    with pytest.raises(DataError, match=r"annotations/a\.png is 8x6, .* is 6x8 after its EXIF rot"):
        source.read(0)
    sample = source.read(1)
    assert sample.image.size == sample.mask.size and sample.notes == ("EXIF rotation",)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"images/a.png", "annotations/a.png", "images/b.png"}, "annotations has no mask for b;"),
        ({"images/a.png", "annotations/a.png", "annotations/b.png"}, "images has no image for b;"),
        ({"images/a.png", "images/a.jpg", "annotations/a.png"}, r"holds a\.jpg and a\.png"),
        ({"images/val/a.png", "annotations/val/a.png"}, "no part 'train'; choose one of val"),
        ({"images/a.png"}, "annotations does not exist"),
        ({"images/a.txt", "annotations/a.png"}, "holds no image"),
    ],
)
def test_missing_and_double_files_are_named(tmp_path: Path, files: set[str], words: str):
    for file in files:
        save(tmp_path / file, random_mask(0, [0]))
    with pytest.raises(DataError, match=words):
        open_source("segmentation", tmp_path)


def test_ignore_index_must_be_a_mask_value(tmp_path: Path):
    with pytest.raises(DataError, match=r"ignore_index must be in \[0, 255\], got 256"):
        open_source("segmentation", tmp_path, ignore_index=256)
