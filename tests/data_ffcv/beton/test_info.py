"""Damaged and unfinished files, and files of another kind: each error says what to do."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_ffcv import DataError, inspect_beton
from data_ffcv.beton.info import side_path
from data_ffcv.beton.layout import (
    ALLOCATION,
    FIELD,
    HEADER,
    LABELLED,
    LABELLED_FIELDS,
    MASKED,
    METADATA_START,
    RAW,
    compute_checksums,
    read_layout,
)
from tests.data_ffcv.conftest import NUM_GREY

PAGE = 8 << 20


def test_segmentation_file_says_where_everything_is(
    segmentation_beton: Path, segmentation_folder: Path
):
    info = inspect_beton(segmentation_beton)
    assert info.has_masks and info.labels is None
    assert info.num_samples == 12 and info.classes == ("0", "1", "2", "3")
    assert (info.min_height, info.max_height) == (45, 80)
    assert (info.min_width, info.max_width) == (50, 97)
    samples = info.samples
    assert (samples.num_bytes == 3 * samples.heights.astype(int) * samples.widths).all()
    assert samples.mask_pointers.tolist() == (samples.pointers + samples.num_bytes).tolist()


def test_labelled_file_has_no_masks(colour_beton: Path):
    info = inspect_beton(colour_beton)
    assert not info.has_masks and info.samples.mask_pointers is None
    assert sorted(info.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (info.samples.modes == RAW).all()


def test_classes_from_labels_without_side_file(grey_beton: Path, tmp_path: Path):
    copy = shutil.copy(grey_beton, tmp_path / "copy.beton")
    assert inspect_beton(copy).classes == tuple(map(str, range(10)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "does not exist; create it"),
        ("folder", "cannot be opened"),
        ("empty", "is empty; convert"),
        ("text", "not a .beton file of version 2; convert"),
        ("header", "truncated within its header"),
        ("fields", "truncated within its header"),
        ("metadata", "is truncated, 3000 bytes instead of"),
        ("half", "is truncated"),
        ("table", "is truncated"),
        ("no table", "is truncated"),
        ("longer", "contradict .*do not fill"),
        ("unfinished", "unfinished, its writer was stopped; convert"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(
    grey_beton: Path, tmp_path: Path, damage: str, words: str
):
    content = grey_beton.read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello " * 1000,
        "header": content[:20],
        "fields": content[:1000],
        "metadata": content[:3000],
        "half": content[: len(content) // 2],
        "table": content[:-5],
        "no table": content[: -24 * NUM_GREY],
        "longer": content + bytes(24),
        "unfinished": content[:16] + bytes(8) + content[24:],
    }
    path = tmp_path / "damaged.beton"
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=rf"damaged\.beton .*{words}"):
        inspect_beton(path)


def test_a_damaged_label_does_not_name_billions_of_classes(grey_beton: Path, tmp_path: Path):
    content = bytearray(grey_beton.read_bytes())
    split_parts(content, LABELLED, 1)["row"]["label"][7] = 1 << 33
    path = tmp_path / "damaged.beton"  # without a side file, which would name the classes
    path.write_bytes(content)
    with pytest.raises(DataError, match="label 8589934592"):
        inspect_beton(path)


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("header", "num_fields", 3, "wrong fields, 3"),
        ("header", "page_size", 1000, "page size is 1000"),
        ("header", "num_samples", 0, "holds no sample"),
        ("header", "num_samples", 1 << 60, "truncated"),
        ("header", "num_samples", NUM_GREY - 1, "do not fill"),
        ("field", "type_id", 0, r"wrong fields, image \(type 2\), label \(type 0\)"),
        ("field", "name", b"target", r"wrong fields, .*target \(type 1\)"),
        ("image", "data_ptr", 1 << 60, "table and its metadata differ"),
        ("image", "height", 0, "no pixel"),
        ("image", "width", 27, "table and its metadata differ"),
        ("image", "mode", 2, "neither JPEG nor raw"),
        ("row", "label", -1, "negative label, -1"),
        ("row", "label", 10, "label 10, but .* names only 10 classes"),
        ("table", "sample_id", NUM_GREY, "does not exist"),
        ("table", "sample_id", 0, "table and its metadata differ"),
        ("table", "ptr", 0, "outside the data"),
        ("table", "ptr", 1 << 63, "outside the data"),
        ("table", "size", 1 << 62, "outside the data"),
        ("table", "size", 5, "table and its metadata differ"),
    ],
)
def test_one_wrong_value_is_noticed(
    grey_beton: Path, tmp_path: Path, part: str, field: str, value: object, words: str
):
    content = bytearray(grey_beton.read_bytes())
    parts = split_parts(content, LABELLED, 1)
    parts["field"] = parts["fields"][1:]
    parts["image"] = parts["row"]["image"]
    row = 0 if part in ("header", "field") else 100
    parts[part][field][row] = value
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    shutil.copy(side_path(grey_beton), side_path(path))
    with pytest.raises(DataError, match=words):
        inspect_beton(path)


def split_parts(content: bytearray, rows: np.dtype, num_regions: int) -> dict[str, np.ndarray]:
    """Writable views of the tables in a file's content."""
    header = np.frombuffer(content, HEADER, 1)
    count, table = int(header["num_samples"][0]), int(header["alloc_table_ptr"][0])
    return {
        "header": header,
        "fields": np.frombuffer(content, FIELD, 2, HEADER.itemsize),
        "row": np.frombuffer(content, rows, count, METADATA_START),
        "table": np.frombuffer(content, ALLOCATION, count * num_regions, table),
    }


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("mask", "size", 1, "not of the size of its image"),
        ("mask", "ptr", PAGE, "table and its metadata differ"),
        ("table", "size", 1, "table and its metadata differ"),
    ],
)
def test_one_wrong_value_about_a_mask_is_noticed(
    segmentation_beton: Path, tmp_path: Path, part: str, field: str, value: int, words: str
):
    content = bytearray(segmentation_beton.read_bytes())
    parts = split_parts(content, MASKED, 2)
    parts["mask"] = parts["row"]["mask"]
    parts[part][field][7] = value
    (tmp_path / "a.beton").write_bytes(content)
    with pytest.raises(DataError, match=words):
        inspect_beton(tmp_path / "a.beton")


def test_twice_the_same_region_leaves_another_out(segmentation_beton: Path, tmp_path: Path):
    content = bytearray(segmentation_beton.read_bytes())
    table = split_parts(content, MASKED, 2)["table"]
    table[6] = table[4]
    (tmp_path / "a.beton").write_bytes(content)
    with pytest.raises(DataError, match="leaves a sample out"):
        inspect_beton(tmp_path / "a.beton")


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"classes": list("0123456789"), "num_samples": 7}, "another file of 7 samples"),
        ({"classes": ["a"], "num_samples": NUM_GREY}, "label 9, but .* names only 1 classes"),
        ({"num_samples": NUM_GREY}, "json is damaged"),
        ([], "json is damaged"),
    ],
)
def test_side_file_that_does_not_belong_is_refused(
    grey_beton: Path, tmp_path: Path, side: object, words: str
):
    path = shutil.copy(grey_beton, tmp_path / "copy.beton")
    side_path(path).write_text(json.dumps(side))
    with pytest.raises(DataError, match=words):
        inspect_beton(path)


def test_masks_without_class_names_are_refused(segmentation_beton: Path, tmp_path: Path):
    path = shutil.copy(segmentation_beton, tmp_path / "copy.beton")
    with pytest.raises(DataError, match=r"copy\.beton\.json is missing, which names the classes"):
        inspect_beton(path)


def write_large(path: Path, num_samples: int) -> np.ndarray:
    """A file of empty pages with true tables, in which table rows stand in random order."""
    rng = np.random.default_rng(0)
    rows, table = np.zeros(num_samples, LABELLED), np.zeros(num_samples, ALLOCATION)
    sides = rng.integers(1, 500, (2, num_samples))
    sizes = 3 * sides[0] * sides[1]
    start = -(-(METADATA_START + rows.nbytes) // PAGE) * PAGE
    ends = start + np.cumsum(sizes)
    image = rows["image"]
    image["mode"], image["height"], image["width"] = RAW, *sides
    image["data_ptr"] = ends - sizes
    rows["label"] = np.arange(num_samples) % 1000
    table["sample_id"], table["ptr"], table["size"] = np.arange(num_samples), ends - sizes, sizes
    fields = np.array([(*field, bytes(1024)) for field in LABELLED_FIELDS], FIELD)
    header = np.array((2, 2, PAGE, num_samples, ends[-1]), HEADER)
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
        file.seek(ends[-1])
        file.write(rng.permutation(table).tobytes())
    return sides


def test_many_samples_take_little_memory(tmp_path: Path):
    num_samples = 300_000
    sides = write_large(tmp_path / "large.beton", num_samples)
    tracemalloc.start()
    info = inspect_beton(tmp_path / "large.beton")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 32 * num_samples and peak - kept < 16 << 20
    assert np.array_equal(info.samples.heights, sides[0])
    assert np.array_equal(info.samples.num_bytes, 3 * sides[0] * sides[1])
    assert info.num_classes == 1000


def test_a_header_can_be_read_alone(grey_beton: Path):
    layout = read_layout(grey_beton)
    assert layout[:3] == (NUM_GREY, False, PAGE)
    assert layout.metadata_end == 24 + 2 * 1041 + 24 * NUM_GREY
    assert (layout.data_start, layout.table_start) == (PAGE, 2 * PAGE)


def test_every_byte_is_in_one_checksum(grey_beton: Path, tmp_path: Path):
    content = bytearray(grey_beton.read_bytes())
    layout = read_layout(grey_beton)
    path = tmp_path / "a.beton"

    def compute() -> tuple:
        path.write_bytes(content)
        with path.open("rb") as file:
            digest, checksums = compute_checksums(file, layout)
        return digest, checksums["metadata"], *checksums["pages"], checksums["table"]

    sound = compute()
    assert len(sound) == 4
    places = {0: 1, PAGE - 1: 1, PAGE: 2, 2 * PAGE - 1: 2, 2 * PAGE: 3, len(content) - 1: 3}
    for place, changed in places.items():
        content[place] ^= 16
        checksums = compute()
        content[place] ^= 16
        assert [i for i in range(4) if checksums[i] != sound[i]] == [0, changed]
