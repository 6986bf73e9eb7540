"""What we write, FFCV reads: layout, pages and pixels against FFCV's own writer and loader."""

import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import inspect_beton
from data_ffcv.beton.info import BetonInfo, side_path
from data_ffcv.beton.layout import JPG, RAW
from data_ffcv.conversion.encoding import Encoding
from data_ffcv.conversion.writer import PageWriter, Written, write_beton
from data_ffcv.errors import DataError
from data_ffcv.sources import Sample
from tests.data_ffcv.conftest import smooth_image

MEBIBYTE = 1 << 20
needs_ffcv = pytest.mark.skipif(not importlib.util.find_spec("ffcv"), reason="FFCV is missing")


@dataclass
class ListSource:
    """Images in memory, each a class of its own; None stands for one that cannot be read."""

    images: list[Image.Image | None]
    has_masks: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(i) for i in range(len(self)))

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.has_masks else np.arange(len(self))

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> Sample:
        image = self.images[index]
        if image is None:
            raise OSError("bad\nsector")
        return Sample(image, to_mask(image) if self.has_masks else None, ())


def to_mask(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image)[..., 0] % 4)


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def write(
    path: Path, source: ListSource, encoding: Encoding | None = None, **settings: object
) -> Written:
    with path.open("w+b") as file:
        indices = np.arange(len(source))
        written = write_beton(file, source, indices, encoding or Encoding(), **settings)
    if source.has_masks:
        text = f'{{"classes": ["a", "b", "c", "d"], "num_samples": {written.num_samples}}}'
        side_path(path).write_text(text)
    return written


def read_stored(info: BetonInfo, index: int) -> bytes:
    """The stored bytes of one image."""
    with info.path.open("rb") as file:
        file.seek(info.samples.pointers[index])
        return file.read(info.samples.num_bytes[index])


def run_python(code: str, *arguments: object) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[3]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}  # the same code; compiling takes seconds
    result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr


FFCV_CODE = """
import sys
from itertools import product
from pathlib import Path
import numpy as np
import data_ffcv.streams.ffcv_backend  # quicker to import than FFCV itself
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder = Path(sys.argv[1])
settings = {"num_workers": 1, "batches_ahead": 1, "drop_last": False, "seed": 1}
orders = (OrderOption.RANDOM, OrderOption.QUASI_RANDOM)
for file in sorted((folder / "read").glob("*.beton")):
    for order, os_cache in product(orders, (True, False)):
        loader = Loader(str(file), 4, order=order, os_cache=os_cache, **settings)
        images, others = zip(*((a.numpy().copy(), b.numpy().copy()) for a, b in loader))
        name = f"{file.stem}-{order.name}-{os_cache}.npz"
        np.savez(file.with_name(name), images=np.concatenate(images), others=np.concatenate(others))
images = list(np.load(folder / "images.npz").values())
labelled = [(image, number) for number, image in enumerate(images)]
masked = [(image, image[..., 0].reshape(-1) % 4) for image in images]
for name, samples, field in (("label", labelled, IntField()), ("mask", masked, BytesField())):
    fields = {"image": RGBImageField(write_mode="raw"), name: field}
    writer = DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1)
    writer.from_indexed_dataset(samples)
"""
# about 3 MB, so that two fit into a page but neither three nor two with their masks twice
TO_WRITE = [(900, 1100), (900, 1100), (31, 33), (1, 1), (900, 1300), (900, 1100)]
NUM_READ = 7


def images_to_read() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [smooth_image(rng, 700, 900) for _ in range(NUM_READ)]  # four fill a page


@pytest.fixture(scope="module")
def ffcv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FFCV, in one process, wrote of `TO_WRITE`, and read of our files in `read`."""
    folder = tmp_path_factory.mktemp("ffcv")
    np.savez(folder / "images.npz", *map(np.asarray, noise(*TO_WRITE)))
    (folder / "read").mkdir()
    images = images_to_read()
    write(folder / "read" / "jpg.beton", ListSource(images), Encoding("jpg"))
    write(folder / "read" / "mask.beton", ListSource(images, has_masks=True))
    write(folder / "read" / "skip.beton", ListSource([None, *images, None]), skip_errors=True)
    run_python(FFCV_CODE, folder)
    return folder


@needs_ffcv
def test_bytes_are_those_of_ffcvs_own_writer(ffcv_folder: Path):
    folder, images = ffcv_folder, noise(*TO_WRITE)
    write(folder / "our_label.beton", ListSource(images))
    write(folder / "our_mask.beton", ListSource(images, has_masks=True))
    ours, theirs = ((folder / f"{o}label.beton").read_bytes() for o in ("our_", ""))
    assert ours == theirs
    side_path(folder / "mask.beton").write_bytes(side_path(folder / "our_mask.beton").read_bytes())
    ours, theirs = (inspect_beton(folder / f"{o}mask.beton") for o in ("our_", ""))
    ours_raw, theirs_raw = ours.path.read_bytes(), theirs.path.read_bytes()
    # FFCV leaves scraps of samples that did not fit at the ends of pages, so only tables are equal
    page = 8 * MEBIBYTE
    assert len(ours_raw) == len(theirs_raw)
    assert ours_raw[:page] == theirs_raw[:page]
    assert ours_raw[-len(images) * 48 :] == theirs_raw[-len(images) * 48 :]
    for i, image in enumerate(images):
        assert read_stored(ours, i) == read_stored(theirs, i) == image.tobytes()
        start = ours.samples.mask_pointers[i]
        mask = to_mask(image).tobytes()
        assert ours_raw[start : start + len(mask)] == mask
        assert theirs_raw[start : start + len(mask)] == mask


@needs_ffcv
def test_ffcvs_own_loader_reads_every_kind_in_every_mode(ffcv_folder: Path):
    outputs = sorted((ffcv_folder / "read").glob("*.npz"))
    kinds = [file.stem.split("-")[0] for file in outputs]
    assert kinds == ["jpg"] * 4 + ["mask"] * 4 + ["skip"] * 4
    originals = np.stack([np.asarray(image) for image in images_to_read()])
    for kind, file in zip(kinds, outputs, strict=True):
        with np.load(file) as content:
            check_what_ffcv_read(kind, content["images"], content["others"], originals)


def check_what_ffcv_read(
    kind: str, pixels: np.ndarray, others: np.ndarray, originals: np.ndarray
) -> None:
    if kind == "mask":
        first = originals[:, 0, 0].tolist()  # differ
        numbers = [first.index(image[0, 0].tolist()) for image in pixels]
        assert np.array_equal(others, (originals[numbers][..., 0] % 4).reshape(len(others), -1))
    else:
        numbers = (others.reshape(-1) - (kind == "skip")).tolist()
    assert sorted(numbers) == list(range(len(originals))) and numbers != sorted(numbers)
    if kind == "jpg":
        assert 0 < np.abs(originals[numbers].astype(np.int16) - pixels).mean() < 3
    else:
        assert np.array_equal(originals[numbers], pixels)


@pytest.mark.parametrize("write_mode", ["raw", "jpg", "proportion", "smart"])
def test_write_modes_store_what_they_say(tmp_path: Path, write_mode: str):
    rng = np.random.default_rng(0)
    sizes = [(128, 128), (129, 128), (60, 60), (200, 150)] * 10
    images = [smooth_image(rng, *size) for size in sizes]
    encoding = Encoding(write_mode, compress_probability=0.75, seed=5)
    write(tmp_path / "a.beton", ListSource(images), encoding)
    info = inspect_beton(tmp_path / "a.beton")
    is_jpg = info.samples.modes == JPG
    expected = {
        "raw": np.zeros(40, bool),
        "jpg": np.ones(40, bool),
        "smart": np.array([h * w > 128 * 128 for h, w in sizes]),
    }
    if write_mode in expected:
        assert np.array_equal(is_jpg, expected[write_mode])
    else:
        assert 22 <= is_jpg.sum() <= 37  # 99.9 % of Binomial(40, 0.75)
    for number, image in enumerate(images):
        stored = read_stored(info, number)
        assert (info.samples.heights[number], info.samples.widths[number]) == sizes[number]
        if not is_jpg[number]:
            assert stored == image.tobytes()
        else:
            assert_like_pillows_jpeg(stored, image, quality=90)


def assert_like_pillows_jpeg(stored: bytes, image: Image.Image, quality: int) -> None:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    ours, theirs = Image.open(io.BytesIO(stored)), Image.open(file)
    assert ours.quantization == theirs.quantization and ours.layer == theirs.layer
    our_error, their_error = (
        np.square(np.asarray(jpeg).astype(float) - np.asarray(image)).mean()
        for jpeg in (ours, theirs)
    )
    assert our_error <= 1.2 * their_error


def test_proportion_is_seeded_by_sample_not_by_place(tmp_path: Path):
    images = noise(*[(8, 8)] * 30)
    modes = []
    for name, seed, indices in (
        ("a", 1, np.arange(30)),
        ("b", 1, np.arange(30)[::-1]),
        ("c", 2, np.arange(30)),
    ):
        with (tmp_path / name).open("w+b") as file:
            encoding = Encoding("proportion", seed=seed)
            write_beton(file, ListSource(images), indices, encoding)
        info = inspect_beton(tmp_path / name)
        modes.append(info.samples.modes[np.argsort(info.labels)].tolist())
    assert modes[0] == modes[1] != modes[2]


@pytest.mark.parametrize("has_masks", [False, True])
def test_large_samples_get_larger_pages_that_nothing_crosses(tmp_path: Path, has_masks: bool):
    sides = [1000, 1800, 1000, 2500, 100, 1000]  # up to 18.75 MB, with its mask 25 MB
    source = ListSource([Image.new("RGB", (side, side), (7, 8, side % 256)) for side in sides])
    source.has_masks = has_masks
    write(tmp_path / "a.beton", source, num_workers=2)
    info = inspect_beton(tmp_path / "a.beton")
    page_size = int.from_bytes((tmp_path / "a.beton").read_bytes()[4:8], "little")
    assert page_size == 32 * MEBIBYTE
    ends = info.samples.pointers + info.samples.num_bytes
    if has_masks:
        assert np.array_equal(info.samples.mask_pointers, ends)
        ends = ends + np.square(sides)
    assert np.array_equal(info.samples.pointers // page_size, (ends - 1) // page_size)
    assert (info.samples.pointers[1:] >= ends[:-1]).all()
    assert all(read_stored(info, i) == source.images[i].tobytes() for i in range(len(sides)))


def test_metadata_of_more_than_a_page_moves_the_data(tmp_path: Path):
    source = ListSource(noise((5, 5)))
    encoded = Encoding().encode(source.read(0), 0)
    with (tmp_path / "a.beton").open("w+b") as file:
        writer = PageWriter(file, 360_000, has_masks=False)  # of which all but one are skipped
        writer.add(encoded, 3)
        writer.finish()
    info = inspect_beton(tmp_path / "a.beton")
    assert info.samples.pointers.tolist() == [16 * MEBIBYTE] and info.labels.tolist() == [3]
    assert read_stored(info, 0) == source.images[0].tobytes()


def test_skipped_samples_are_named_and_leave_no_gap_in_the_labels(tmp_path: Path):
    images: list[Image.Image | None] = [*noise(*[(9, 9)] * 20)]
    images[3] = images[17] = None
    written = write(tmp_path / "a.beton", ListSource(images), skip_errors=True, num_workers=3)
    assert written.skipped == [("image 3", "bad sector"), ("image 17", "bad sector")]
    info = inspect_beton(tmp_path / "a.beton")
    kept = [number for number in range(20) if number not in (3, 17)]
    assert info.labels.tolist() == kept and written.num_samples == 18
    for place, number in enumerate(kept):
        assert read_stored(info, place) == images[number].tobytes()


def test_first_bad_sample_in_order_stops_and_all_skipped_is_an_error(tmp_path: Path):
    images = [*noise(*[(9, 9)] * 30), None, None]
    with pytest.raises(DataError, match=r"^image 30 .*bad sector .*--on_error skip"):
        write(tmp_path / "a.beton", ListSource(images), num_workers=4)
    with pytest.raises(DataError, match=r"none of the images .*image 0: bad sector"):
        write(tmp_path / "a.beton", ListSource([None, None]), skip_errors=True)
    with pytest.raises(DataError, match="is empty"):
        inspect_beton(tmp_path / "a.beton")


def test_memory_in_flight_is_bounded(tmp_path: Path):
    read, done = [], 0

    class Counting(ListSource):
        def read(self, index: int) -> Sample:
            read.append(index)
            return super().read(index)

    most_ahead = 0

    def on_sample() -> None:
        nonlocal done, most_ahead
        done += 1
        most_ahead = max(most_ahead, len(read) - done)

    write(tmp_path / "a.beton", Counting(noise((8, 8)) * 1000), num_workers=2, on_sample=on_sample)
    assert done == 1000 and most_ahead <= 4 * 32  # a run for each worker, and two that wait


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"shortest_side": 50}, (60, 50)),
        ({"longest_side": 50}, (50, 42)),
        ({"shortest_side": 101}, (120, 100)),
        ({"longest_side": 120}, (120, 100)),
        ({"longest_side": 1}, (1, 1)),
    ],
)
def test_sides_are_shrunk_only_and_masks_follow(settings: dict, size: tuple[int, int]):
    image = smooth_image(np.random.default_rng(0), 100, 120)
    mask = to_mask(image)
    encoded = Encoding(**settings).encode(Sample(image, mask, ("odd",)), 0)
    assert (encoded.width, encoded.height) == size and encoded.mode == RAW
    expected = image.resize(size, Image.Resampling.BICUBIC)
    pixels = encoded.image.reshape(*size[::-1], 3).astype(int)
    assert np.abs(pixels - np.asarray(expected)).mean() < (1 if size[0] > 1 else 16)
    expected_mask = mask.resize(size, Image.Resampling.NEAREST)
    assert np.array_equal(encoded.mask.reshape(size[::-1]), np.asarray(expected_mask))
    assert encoded.notes == ("odd",)


def test_image_with_a_side_that_the_format_cannot_hold():
    with pytest.raises(ValueError, match=r"70000x1 .*--longest_side"):
        Encoding().encode(Sample(Image.new("RGB", (70000, 1)), None, ()), 0)
    assert (
        Encoding(longest_side=1024).encode(Sample(Image.new("RGB", (70000, 1)), None, ()), 0).width
        == 1024
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"write_mode": "png"},
        {"jpeg_quality": 0},
        {"compress_probability": 1.5},
        {"shortest_side": 0},
        {"shortest_side": 5, "longest_side": 5},
        {"seed": -1},
    ],
)
def test_bad_encoding_is_refused_by_name(settings: dict):
    with pytest.raises(DataError, match=next(iter(settings))):
        Encoding(**settings)
