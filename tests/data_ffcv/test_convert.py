"""Conversion keeps pixels and labels, and whatever goes wrong leaves nothing but a sentence."""

import hashlib
import json
import os
import pickle
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError, inspect_beton
from data_ffcv.convert import convert, held_out_path, main
from tests.data_ffcv.conftest import NUM_GREY, smooth_image


def read_raw(path: Path) -> list[np.ndarray]:
    """All images of a raw file, uint8 [height, width, 3], in file order."""
    content, samples = path.read_bytes(), inspect_beton(path).samples
    sizes = zip(samples.pointers, samples.heights.astype(int), samples.widths, strict=True)
    return [
        np.frombuffer(content, np.uint8, 3 * height * width, start).reshape(height, width, 3)
        for start, height, width in sizes
    ]


def read_numbers(path: Path) -> np.ndarray:
    """The numbers that the grey fixture wrote into each image's first two pixels."""
    return np.array([int(image[0, 0, 0]) * 256 + int(image[0, 1, 0]) for image in read_raw(path)])


def read_side(path: Path) -> dict:
    return json.loads(Path(f"{path}.json").read_text())


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    """12 images of two classes, of which 7.png is cut and 4.png has a palette."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(12):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = smooth_image(rng, 40, 40)
        (image.quantize(16) if number == 4 else image).save(path)
    broken = folder / "b" / "7.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


def test_idx_roundtrip_is_exact_and_shuffled(grey_beton: Path):
    original = np.random.default_rng(0).integers(0, 256, (NUM_GREY, 28, 28), dtype=np.uint8)
    number = read_numbers(grey_beton)
    assert np.array_equal(number, np.random.default_rng(0).permutation(NUM_GREY))
    assert np.array_equal(inspect_beton(grey_beton).labels, number % 10)
    images = np.stack(read_raw(grey_beton))
    original[:, 0, 0], original[:, 0, 1] = np.arange(NUM_GREY) // 256, np.arange(NUM_GREY) % 256
    for channel in range(3):
        assert np.array_equal(images[..., channel], original[number])


def test_segmentation_roundtrip_is_exact(segmentation_folder: Path, segmentation_beton: Path):
    info, images = inspect_beton(segmentation_beton), read_raw(segmentation_beton)
    content = segmentation_beton.read_bytes()
    for place, number in enumerate(np.random.default_rng(0).permutation(12)):
        image = np.asarray(Image.open(segmentation_folder / "images" / f"{number:02}.png"))
        mask = Image.open(segmentation_folder / "annotations" / f"{number:02}.png").tobytes()
        start = info.samples.mask_pointers[place]
        assert np.array_equal(images[place], image)
        assert content[start : start + len(mask)] == mask


def test_side_file_describes_the_file(grey_beton: Path):
    side, content = read_side(grey_beton), grey_beton.read_bytes()
    expected = {
        "format": "fashion-mnist",
        "part": "train",
        "num_samples": NUM_GREY,
        "num_skipped": 0,
        "image_size": {"height": [28, 28], "width": [28, 28]},
        "write_mode": "raw",
        "jpeg_quality": 90,
        "seed": 0,
        "subset": None,
        "split": None,
        "notes": {},
        "page_size": 8 << 20,
        "sha256": hashlib.sha256(content).hexdigest(),
        "checksums": {
            "metadata": zlib.crc32(content[: 8 << 20]),
            "pages": [zlib.crc32(content[8 << 20 : 16 << 20])],
            "table": zlib.crc32(content[16 << 20 :]),
        },
    }
    assert {key: side[key] for key in expected} == expected
    assert side["classes"][9] == "Ankle boot"


def test_cifar10_pickles(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3072), dtype=np.uint8)
    for batch in range(5):
        content = {b"data": pixels[batch], b"labels": list(range(6))}
        (tmp_path / f"data_batch_{batch + 1}").write_bytes(pickle.dumps(content))
    names = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(names))
    info = convert("cifar10", tmp_path, tmp_path / "out.beton", num_workers=2)
    order = np.random.default_rng(0).permutation(30)
    expected = pixels.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)[order]
    assert np.array_equal(read_raw(info.path), expected)
    assert np.array_equal(info.labels, order % 6) and info.classes[3] == "class3"


@pytest.mark.parametrize("write_mode", ["raw", "proportion"])
def test_number_of_workers_changes_no_byte(image_folder: Path, tmp_path: Path, write_mode: str):
    contents = set()
    for num_workers in (1, 2, 4):
        out = tmp_path / f"{num_workers}.beton"
        settings = {"write_mode": write_mode, "longest_side": 64, "num_workers": num_workers}
        convert("imagefolder", image_folder, out, **settings)
        contents.add(out.read_bytes())
    assert len(contents) == 1
    convert("imagefolder", image_folder, tmp_path / "seed.beton", **(settings | {"seed": 1}))
    assert (tmp_path / "seed.beton").read_bytes() not in contents


def test_split_and_subset_are_by_class_disjoint_and_seeded(idx_folder: Path, tmp_path: Path):
    settings = {"split": 0.8, "subset": 100}
    infos = [
        convert("fashion-mnist", idx_folder, tmp_path / f"{i}.beton", seed=seed, **settings)
        for i, seed in enumerate((0, 0, 1))
    ]
    rest = inspect_beton(held_out_path(infos[0].path))
    assert rest.path.name == "0.held_out.beton"
    assert np.bincount(infos[0].labels).tolist() == [8] * 10
    assert np.bincount(rest.labels).tolist() == [2] * 10
    first, again, other = (read_numbers(info.path).tolist() for info in infos)
    assert len({*first, *read_numbers(rest.path).tolist()}) == 100
    assert first == again and set(first) != set(other)
    assert read_side(rest.path)["held_out"] and not read_side(infos[0].path)["held_out"]


@pytest.mark.parametrize(("subset", "count"), [(7, 7), (0.1, 20), (1.0, NUM_GREY), (5.0e-3, 1)])
def test_subset_is_a_number_or_a_share(idx_folder: Path, tmp_path: Path, subset: float, count: int):
    info = convert("fashion-mnist", idx_folder, tmp_path / "a.beton", subset=subset)
    assert info.num_samples == count
    counts = np.bincount(info.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_segmentation_is_split_too(segmentation_folder: Path, tmp_path: Path):
    info = convert("segmentation", segmentation_folder, tmp_path / "a.beton", split=0.75)
    assert (info.num_samples, inspect_beton(held_out_path(info.path)).num_samples) == (9, 3)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_corrupt_image_is_named_and_nothing_is_left(
    broken_folder: Path, tmp_path: Path, num_workers: int, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "o.beton"
    with pytest.raises(DataError, match=r"7\.png cannot be converted"):
        convert("imagefolder", broken_folder, out, num_workers=num_workers, split=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert capfd.readouterr().err == ""


def test_skipped_and_changed_images_are_reported(broken_folder: Path, tmp_path: Path):
    out = tmp_path / "o.beton"
    info = convert("imagefolder", broken_folder, out, on_error="skip")
    side = read_side(out)
    assert info.num_samples == side["num_samples"] == 11 and side["num_skipped"] == 1
    assert side["notes"] == {"palette to RGB": 1}
    skipped, changed = Path(f"{out}.report.txt").read_text().splitlines()
    assert skipped.startswith(f"skipped\t{broken_folder}/b/7.png\t")
    assert changed == f"changed\t{broken_folder}/a/4.png\tpalette to RGB"
    assert np.bincount(info.labels).tolist() == [6, 5]
    (broken_folder / "b" / "7.png").unlink()
    (broken_folder / "a" / "4.png").unlink()
    convert("imagefolder", broken_folder, out, overwrite=True)
    assert not Path(f"{out}.report.txt").exists()


def test_names_that_are_no_text_are_reported(broken_folder: Path, tmp_path: Path):
    out = tmp_path / "o.beton"
    for file in ("b/7.png", "a/4.png"):
        (broken_folder / file).rename(os.fsdecode(os.fsencode(broken_folder / file) + b"\xff.png"))
    convert("imagefolder", broken_folder, out, on_error="skip")
    skipped, changed = Path(f"{out}.report.txt").read_text(encoding="utf-8").splitlines()
    assert r"/b/7.png\udcff.png" in skipped and r"/a/4.png\udcff.png" in changed


def test_existing_output_is_refused_unless_overwritten(idx_folder: Path, tmp_path: Path):
    out = tmp_path / "out.beton"
    out.write_text("precious")
    with pytest.raises(DataError, match="--overwrite"):
        convert("fashion-mnist", "nowhere", out)
    with pytest.raises(DataError, match="nowhere"):
        convert("fashion-mnist", "nowhere", out, overwrite=True)
    assert out.read_text() == "precious"
    info = convert("fashion-mnist", idx_folder, out, part="test", overwrite=True)
    assert info.num_samples == 20 and info.path == out
    held_out_path(tmp_path / "b.beton").write_text("precious")
    with pytest.raises(DataError, match=r"b\.held_out\.beton exists"):
        convert("fashion-mnist", idx_folder, tmp_path / "b.beton", split=0.5)


@pytest.mark.parametrize(
    ("out", "settings", "words"),
    [
        ("o.bin", {}, r"o\.bin must end in \.beton"),
        ("/dev/null/o.beton", {}, r"^/dev/null is not a folder; give another place"),
        ("o.beton", {"num_workers": 0}, "num_workers"),
        ("o.beton", {"subset": 0}, "subset"),
        ("o.beton", {"subset": 1.5}, "subset"),
        ("o.beton", {"subset": NUM_GREY + 1}, "subset 204 is more than the 203"),
        ("o.beton", {"subset": 1, "split": 0.5}, "leaves no image"),
        ("o.beton", {"split": 1.0}, "split"),
        ("o.beton", {"on_error": "ignore"}, "on_error"),
        ("o.beton", {"longest_side": 0}, "longest_side"),
    ],
)
def test_bad_settings_are_named_and_leave_nothing(
    idx_folder: Path, tmp_path: Path, out: str, settings: dict, words: str
):
    with pytest.raises(DataError, match=words):
        convert("fashion-mnist", idx_folder, tmp_path / out, **settings)
    assert not list(tmp_path.iterdir())


def test_progress_ends_complete(idx_folder: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    out = tmp_path / "a.beton"
    convert("fashion-mnist", idx_folder, out, split=0.5, on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (NUM_GREY, NUM_GREY) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagefolder", "nowhere"), "nowhere"),
        (("fashion-mnist", "."), "train-images-idx3-ubyte"),
        (("cifar10", "."), "cifar"),
    ],
)
def test_command_reports_bad_source_with_exit_code_2(
    tmp_path: Path,
    arguments: tuple[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    monkeypatch.setattr(sys, "argv", ["convert", *arguments, "../out.beton"])
    assert main() == 2
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and words in error
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_command_converts(
    broken_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    out = tmp_path / "[b]t:cat:.beton"  # neither markup nor a picture of a cat
    options = ("--on_error", "skip", "--split", "0.5", "--longest_side", "20")
    command = ["convert", "imagefolder", str(broken_folder), str(out), *options]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    error = capfd.readouterr().err
    assert f"{out}: 6 images, 2 classes, " in error or f"{out}: 5 images, 2 classes, " in error
    assert f"{held_out_path(out)}: " in error and "1 skipped, see " in error
    assert inspect_beton(out).max_height == 20
