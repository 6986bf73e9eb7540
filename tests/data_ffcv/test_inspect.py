"""What `inspect` says of a file, the picture it draws, and the damage it finds."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError, inspect_beton
from data_ffcv.beton.contact_sheet import CAPTION, GAP, TILE, write_sheet
from data_ffcv.beton.info import side_path
from data_ffcv.beton.layout import ALLOCATION, HEADER, LABELLED, METADATA_START, read_layout
from data_ffcv.beton.verify import find_gaps, verify
from data_ffcv.convert import convert
from data_ffcv.inspect import count_pixels, describe, main
from tests.data_ffcv.conftest import NUM_GREY


def copy_beton(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    for file in (path, side_path(path)):
        shutil.copy(file, folder / file.name)
    return copy


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ (1 << bit)]))


@pytest.fixture(scope="session")
def jpeg_beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jpeg") / "jpeg.beton"
    convert("imagefolder", image_folder, path, write_mode="jpg")
    return path


@pytest.fixture(scope="session")
def paged_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 3 MB, of which two fit a page of 8 MiB."""
    folder = tmp_path_factory.mktemp("paged")
    (folder / "images" / "only").mkdir(parents=True)
    for number in range(6):
        image = Image.new("RGB", (1000, 1000), (number, 0, 0))
        image.save(folder / "images" / "only" / f"{number}.bmp")
    convert("imagefolder", folder / "images", folder / "paged.beton")
    return folder / "paged.beton"


@pytest.fixture(params=["grey_beton", "colour_beton", "jpeg_beton", "segmentation_beton"])
def any_beton(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# --- verification ------------------------------------------------------------------------------


def test_converted_files_are_sound(any_beton: Path):
    assert verify(any_beton) == []
    assert find_gaps(any_beton) is None


def test_any_flipped_bit_is_found(any_beton: Path, tmp_path: Path):
    """Every byte of the header, and of all the rest some."""
    copy = copy_beton(any_beton, tmp_path)
    rng = np.random.default_rng(0)
    positions = [*range(HEADER.itemsize), *rng.integers(0, copy.stat().st_size, 30).tolist()]
    for position in positions:
        bit = int(rng.integers(8))
        flip_bit(copy, position, bit)
        assert verify(copy), (position, bit)
        flip_bit(copy, position, bit)
    assert verify(copy) == []


def test_a_changed_page_names_its_samples(paged_beton: Path, tmp_path: Path):
    copy = copy_beton(paged_beton, tmp_path)
    samples = inspect_beton(copy).samples
    flip_bit(copy, int(samples.pointers[3]) + 1_234_567)
    (finding,) = verify(copy)
    assert "page 1 " in finding.problem
    assert finding.samples == (2, 3) and str(finding).endswith(": 2 samples 2-3")
    flip_bit(copy, int(samples.pointers[5]) + 7)
    assert [finding.samples for finding in verify(copy)] == [(2, 3), (4, 5)]


def test_a_corrupt_jpeg_names_its_sample(jpeg_beton: Path, tmp_path: Path):
    copy = copy_beton(jpeg_beton, tmp_path)
    flip_bit(copy, int(inspect_beton(copy).samples.pointers[5]))  # no JPEG begins so
    page, image = verify(copy)
    assert "page 0 " in page.problem and 5 in page.samples
    assert "JPEG" in image.problem and image.samples == (5,)
    side_path(copy).unlink()
    assert [finding.samples for finding in verify(copy)] == [(5,)]


def test_a_wrong_mask_value_names_its_sample(segmentation_beton: Path, tmp_path: Path):
    copy = copy_beton(segmentation_beton, tmp_path)
    info = inspect_beton(copy)
    size = int(info.samples.heights[2]) * int(info.samples.widths[2])
    flip_bit(copy, int(info.samples.mask_pointers[2]) + size - 1, bit=6)  # 0 becomes 64, 255 191
    page, mask = verify(copy)
    assert "page 0 " in page.problem and 2 in page.samples
    assert "class" in mask.problem and mask.samples == (2,)


def test_a_changed_label_is_found_in_the_metadata(grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    flip_bit(copy, METADATA_START + 4 * LABELLED.itemsize + LABELLED.fields["label"][1])
    assert inspect_beton(copy).labels[4] in range(10)  # nothing else could notice
    (finding,) = verify(copy)
    assert "metadata" in finding.problem


def test_a_changed_pointer_is_found_twice(grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    flip_bit(copy, METADATA_START + LABELLED.fields["image"][1] + 6)
    structure, checksum = verify(copy)
    assert "contradict" in structure.problem and "metadata" in checksum.problem


def test_a_changed_table_is_found_twice(grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    flip_bit(copy, read_layout(copy).table_start + 9 * ALLOCATION.itemsize + 16)
    structure, checksum = verify(copy)
    assert "contradict" in structure.problem and "allocation table" in checksum.problem


def test_a_truncated_file_is_found(grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 5)
    (finding,) = verify(copy)
    assert "truncated" in finding.problem


def test_what_cannot_be_checked_is_said(grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    content = json.loads(side_path(copy).read_text())
    position = int(inspect_beton(copy).samples.pointers[0])
    flip_bit(copy, position)

    del content["checksums"]
    side_path(copy).write_text(json.dumps(content))
    (finding,) = verify(copy)
    assert "SHA-256" in finding.problem
    assert "cannot be located" in find_gaps(copy)

    side_path(copy).unlink()
    assert verify(copy) == []
    assert "is missing" in find_gaps(copy)


def test_checksums_of_another_file_are_said_to_be(
    grey_beton: Path, paged_beton: Path, tmp_path: Path
):
    copy = copy_beton(grey_beton, tmp_path)
    content = json.loads(side_path(copy).read_text())
    content["checksums"] = json.loads(side_path(paged_beton).read_text())["checksums"]
    side_path(copy).write_text(json.dumps(content))
    (finding,) = verify(copy)
    assert "do not fit" in finding.problem


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no\.beton does not exist"):
        verify(tmp_path / "no.beton")


# --- description -------------------------------------------------------------------------------


def test_description_of_labelled_images(grey_beton: Path):
    rows = dict(describe(inspect_beton(grey_beton)))
    assert rows["kind"] == "classification" and rows["samples"] == str(NUM_GREY)
    assert rows["height"] == rows["width"] == "28 to 28, median 28"
    assert rows["stored as"] == "raw 100.0%, JPEG 0.0%"
    assert rows["stored SHA-256"] == json.loads(side_path(grey_beton).read_text())["sha256"]
    assert rows["class 2 Pullover"] == "21 images" and rows["class 9 Ankle boot"] == "20 images"


def test_many_classes_are_shown_in_part(tmp_path: Path):
    for number in range(30):
        (tmp_path / "images" / f"kind{number:02}").mkdir(parents=True)
        for copy in range({7: 3, 9: 1}.get(number, 2)):
            image = Image.new("RGB", (8, 9))
            image.save(tmp_path / "images" / f"kind{number:02}" / f"{copy}.png")
    convert("imagefolder", tmp_path / "images", tmp_path / "many.beton")
    rows = describe(inspect_beton(tmp_path / "many.beton"))
    names = [name for name, _ in rows[-13:]]
    shown = [f"class {number} kind{number:02}" for number in (*range(5), *range(25, 30))]
    assert [name for name in names if name.startswith("class")] == shown
    assert rows[-2:] == [
        ("most frequent: class 7 kind07", "3 images"),
        ("least frequent: class 9 kind09", "1 images"),
    ]


def test_shares_of_mask_pixels(segmentation_folder: Path, segmentation_beton: Path):
    info, expected = inspect_beton(segmentation_beton), np.zeros(256, np.int64)
    for path in (segmentation_folder / "annotations").iterdir():
        expected += Image.open(path).histogram()
    num_masks, counts = count_pixels(info)
    assert num_masks == info.num_samples and np.array_equal(counts, expected)
    rows = dict(describe(info))
    assert rows["kind"] == "segmentation"
    assert rows["pixels of"] == f"{num_masks} of {num_masks} masks"
    assert rows["ignored"] == f"{expected[255] / expected.sum():.2%}" != "0.00%"
    assert rows[f"class 1 {info.classes[1]}"] == f"{expected[1] / expected.sum():.2%}"


# --- contact sheet -----------------------------------------------------------------------------


def cut_tile(sheet: Image.Image, place: int, num_columns: int, size: tuple[int, int]) -> np.ndarray:
    """The image of the stated (width, height) at the bottom left of a tile."""
    row, column = divmod(place, num_columns)
    left, bottom = GAP + column * (TILE + GAP), GAP + row * (TILE + CAPTION + GAP) + TILE
    return np.asarray(sheet.crop((left, bottom - size[1], left + size[0], bottom)))


@pytest.mark.parametrize(("name", "tolerance"), [("colour_beton", 0), ("jpeg_beton", 10)])
def test_sheet_holds_the_images(
    request: pytest.FixtureRequest, image_folder: Path, tmp_path: Path, name: str, tolerance: int
):
    info, out = inspect_beton(request.getfixturevalue(name)), tmp_path / "sheet.png"
    sources = [Image.open(path).convert("RGB") for path in image_folder.rglob("*.*")]
    by_size = {source.size: source for source in sources}
    assert write_sheet(info, out, 64, seed=0).tolist() == list(range(8))
    sheet = Image.open(out)
    assert sheet.size == (3 * (TILE + GAP) + GAP, 3 * (TILE + CAPTION + GAP) + GAP)
    for index in range(8):
        size = (int(info.samples.widths[index]), int(info.samples.heights[index]))
        expected = by_size[size]
        if max(size) > TILE:
            expected = expected.resize((22, 128), Image.Resampling.BICUBIC)  # 34 x 200
        factor = TILE // max(expected.size)
        expected = np.asarray(expected).repeat(factor, axis=0).repeat(factor, axis=1)
        tile = cut_tile(sheet, index, 3, expected.shape[1::-1])
        assert np.abs(tile.astype(int) - expected).mean() <= tolerance


def test_sheet_lays_masks_over_images(segmentation_beton: Path, tmp_path: Path):
    info, out = inspect_beton(segmentation_beton), tmp_path / "sheet.png"
    chosen = write_sheet(info, out, 4, seed=0)
    content, sheet = np.fromfile(segmentation_beton, np.uint8), Image.open(out)
    colours: dict[int, np.ndarray] = {}
    for place, index in enumerate(chosen.tolist()):
        height, width = int(info.samples.heights[index]), int(info.samples.widths[index])
        assert max(height, width) <= TILE and info.samples.modes[index] == 1
        start, mask_start = info.samples.pointers[index], info.samples.mask_pointers[index]
        pixels = content[start : start + 3 * height * width].reshape(height, width, 3)
        mask = content[mask_start : mask_start + height * width].reshape(height, width)
        factor = TILE // max(height, width)
        tile = cut_tile(sheet, place, 2, (width * factor, height * factor))
        tile = tile[::factor, ::factor].astype(int)
        assert np.array_equal(tile[mask == 255], pixels[mask == 255])
        for value in set(np.unique(mask).tolist()) - {255}:
            colour = (2 * tile - pixels)[mask == value]  # half image, half the class's colour
            colours.setdefault(value, colour[0])
            assert np.abs(colour - colours[value]).max() <= 1
    assert len({tuple(colour // 8) for colour in colours.values()}) == len(colours) > 1


def test_sheet_is_a_seeded_choice(grey_beton: Path, tmp_path: Path):
    info, out = inspect_beton(grey_beton), tmp_path / "sheet.png"
    first = write_sheet(info, out, 20, seed=0)
    pictures = [out.read_bytes()]
    for seed in (0, 1):
        write_sheet(info, out, 20, seed)
        pictures.append(out.read_bytes())
    assert len(set(first.tolist())) == 20
    assert pictures[0] == pictures[1] != pictures[2]
    assert list(tmp_path.iterdir()) == [out]


# --- command -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """run(*arguments) -> (exit code, what was printed, errors)."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, arguments)])
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


def test_command_prints_and_draws(run, grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    for _ in range(2):  # its own sheet may be overwritten
        code, printed, _ = run(copy)
        assert code == 0 and "Ankle boot" in printed
    assert Image.open(f"{copy}.png").size == (
        8 * (TILE + GAP) + GAP,
        8 * (TILE + CAPTION + GAP) + GAP,
    )


def test_command_prints_paths_as_they_are(run, grey_beton: Path, tmp_path: Path):
    """Neither markup nor emoji, and bytes that are no text escaped."""
    folder = tmp_path / "[b]:cat:\udcff"
    folder.mkdir()
    for file in (grey_beton, side_path(grey_beton)):
        shutil.copy(file, folder / file.name)
    code, printed, _ = run(folder / grey_beton.name, "--num_images", 1)
    shown = f"{tmp_path}/[b]:cat:\\udcff/{grey_beton.name}"
    lines = printed.splitlines()
    assert code == 0 and lines[-1] == f"{shown}.png: 1 images"
    assert shown in "".join(line.strip() for line in lines[:-1])  # the title may be folded
    code, printed, _ = run(folder / grey_beton.name, "--verify", "--no-sheet")
    assert printed.splitlines()[0] == f"{shown}: sound"


def test_command_leaves_other_files_alone(run, grey_beton: Path, tmp_path: Path):
    other = tmp_path / "photo.png"
    Image.new("RGB", (3, 3)).save(other)
    before = other.read_bytes()
    code, printed, errors = run(grey_beton, "--out", other)
    assert (code, printed) == (2, "") and "photo.png exists" in errors
    assert other.read_bytes() == before


def test_command_verifies(run, grey_beton: Path, tmp_path: Path):
    copy = copy_beton(grey_beton, tmp_path)
    code, printed, _ = run(copy, "--verify", "--no-sheet")
    assert code == 0 and f"{copy}: sound" in printed
    flip_bit(copy, int(inspect_beton(copy).samples.pointers[0]))
    code, printed, _ = run(copy, "--verify", "--no-sheet")
    assert code == 1 and "page 0" in printed and f"{copy}: damaged" in printed
    side_path(copy).unlink()
    code, printed, _ = run(copy, "--verify", "--no-sheet")
    assert code == 0 and "is missing" in printed and f"{copy}: no damage found" in printed
    assert not Path(f"{copy}.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--num_images", 0], "--num_images"), (["--out", "/no/such/folder/a.png"], "--out")],
)
def test_bad_flags_are_named(run, grey_beton: Path, arguments: list, named: str):
    code, _, errors = run(grey_beton, *arguments)
    assert code == 2 and errors.startswith("error: ") and named in errors


def test_module_runs_as_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "no.beton"), "--no-sheet"])
    monkeypatch.delitem(sys.modules, "data_ffcv.inspect")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("data_ffcv.inspect", run_name="__main__")
    assert exit.value.code == 2
