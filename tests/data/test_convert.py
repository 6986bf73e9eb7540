"""Conversion keeps pixels and labels, and bad input ends with a sentence instead of a hang."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import Augmentation, DataError, inspect_beton, open_eval_loader
from data_ffcv._sources import ArraySource
from data_ffcv.convert import convert, main
from tests.data.conftest import NUM_GREY, UNIT, smooth_image


def read_all(path: Path, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images [N, S, S, 3] uint8 and labels [N], in file order."""
    loader = open_eval_loader(
        path, augmentation=Augmentation("center_crop", image_size), batch_size=64, **UNIT
    )
    batches = [(images.permute(0, 2, 3, 1).numpy(), labels.numpy()) for images, labels in loader]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return images.round().astype(np.uint8), labels


def test_idx_roundtrip_is_exact_and_shuffled(idx_folder: Path, grey_beton: Path):
    original = np.random.default_rng(0).integers(0, 256, (NUM_GREY, 28, 28), dtype=np.uint8)
    images, labels = read_all(grey_beton, 28)
    number = images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]
    assert sorted(number) == list(range(NUM_GREY))
    assert not np.array_equal(number, np.arange(NUM_GREY))
    assert np.array_equal(labels, number % 10)
    original[:, 0, 0], original[:, 0, 1] = images[np.argsort(number), 0, :2, 0].T
    for channel in range(3):
        assert np.array_equal(images[..., channel], original[number])


def test_side_file_and_info(grey_beton: Path):
    side = json.loads(Path(f"{grey_beton}.json").read_text())
    info = inspect_beton(grey_beton)
    assert side["num_samples"] == info.num_samples == NUM_GREY
    assert info.classes[9] == "Ankle boot" and info.num_classes == 10
    assert len(side["sha256"]) == 64
    assert (info.min_height, info.max_width) == (28, 28)
    assert np.bincount(info.labels).tolist() == [21, 21, 21] + [20] * 7


def test_classes_from_labels_without_side_file(grey_beton: Path, tmp_path: Path):
    copy = tmp_path / "copy.beton"
    copy.write_bytes(grey_beton.read_bytes())
    assert inspect_beton(copy).classes == tuple(map(str, range(10)))


def test_image_folder_classes_and_shapes(colour_beton: Path):
    info = inspect_beton(colour_beton)
    assert info.classes == ("ant", "bee", "cat")
    assert (info.min_height, info.max_height) == (33, 200)
    assert (info.min_width, info.max_width) == (34, 100)


@pytest.mark.parametrize("write_mode", ["jpg", "proportion", "smart"])
def test_jpeg_write_modes_stay_close_and_min_side_shrinks(
    image_folder: Path, tmp_path: Path, write_mode: str
):
    raw = convert("imagefolder", image_folder, tmp_path / "raw.beton", min_side=32)
    jpg = convert(
        "imagefolder", image_folder, tmp_path / "a.beton", min_side=32, write_mode=write_mode
    )
    assert (raw.min_height, raw.min_width) == (32, 32) and raw.max_height == 188
    difference = read_all(raw.path, 32)[0].astype(int) - read_all(jpg.path, 32)[0]
    assert np.abs(difference).mean() < 8  # another image would be some 60 away


def test_cifar10_pickles(tmp_path: Path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 6, 3072), dtype=np.uint8)
    for batch in range(5):
        content = {b"data": pixels[batch], b"labels": list(range(6))}
        (tmp_path / f"data_batch_{batch + 1}").write_bytes(pickle.dumps(content))
    names = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps(names))
    info = convert("cifar10", tmp_path, tmp_path / "out.beton", num_workers=2)
    images, labels = read_all(info.path, 32)
    expected = pixels.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)
    order = np.random.default_rng(0).permutation(30)
    assert np.array_equal(images, expected[order])
    assert np.array_equal(labels, order % 6)
    assert info.classes[3] == "class3"


def test_cifar100_meta_names_and_code_in_a_pickle_is_refused(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "meta").write_bytes(pickle.dumps({b"fine_label_names": [Attack()]}))
    with pytest.raises(DataError, match=r"meta is not a CIFAR file .*mkdir"):
        convert("cifar100", tmp_path, tmp_path / "out.beton")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_corrupt_image_is_named_and_nothing_is_left(
    tmp_path: Path, num_workers: int, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        smooth_image(rng, 40, 40).save(folder / f"{i}.png")
    broken = folder / "7.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"7\.png"):
        convert("imagefolder", tmp_path / "images", tmp_path / "o.beton", num_workers=num_workers)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert capfd.readouterr().err == ""


def test_dying_worker_is_noticed(tmp_path: Path):
    from data_ffcv._writer import write_beton

    class Deadly(ArraySource):
        def image(self, index: int) -> Image.Image:
            os._exit(9)

    source = Deadly(tmp_path, ("a",), np.zeros(3, np.int64), np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"died \(exit code 9\)"):
        write_beton(
            source,
            tmp_path / "out.beton",
            image_field={},
            min_side=None,
            num_workers=2,
            seed=0,
            on_progress=lambda done: None,
        )


def test_too_large_image_names_the_mend(tmp_path: Path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (2000, 2000)).save(tmp_path / "images" / "a" / "big.png")
    with pytest.raises(DataError, match=r"big\.png .*--min_side"):
        convert("imagefolder", tmp_path / "images", tmp_path / "out.beton")


def test_existing_output_is_refused_unless_overwritten(idx_folder: Path, tmp_path: Path):
    out = tmp_path / "out.beton"
    out.write_text("precious")
    with pytest.raises(DataError, match="--overwrite"):
        convert("fashion-mnist", idx_folder, out)
    assert out.read_text() == "precious"
    info = convert("fashion-mnist", idx_folder, out, split="test", overwrite=True)
    assert info.num_samples == 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imagefolder", "nowhere"), "not a folder"),
        (("imagefolder", "."), "no class folder"),
        (("fashion-mnist", "."), "train-images-idx3-ubyte.gz does not exist"),
        (("cifar10", "."), "batches.meta does not exist"),
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
    assert not (tmp_path / "out.beton").exists()


def test_command_converts(idx_folder: Path, tmp_path: Path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "data_ffcv.convert", "fashion-mnist"),
            *(str(idx_folder), str(tmp_path / "t.beton"), "--split", "test", "--num_workers", "1"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "20 images, 10 classes" in " ".join(result.stderr.split())


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "no table", "unfinished", "text"])
def test_damaged_beton_is_refused(grey_beton: Path, tmp_path: Path, damage: str):
    content = grey_beton.read_bytes()
    path = tmp_path / "damaged.beton"
    unfinished = content[:16] + bytes(8) + content[24:]
    texts = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "no table": content[: -24 * NUM_GREY],
        "unfinished": unfinished,
        "text": b"hello " * 1000,
    }
    if damage in texts:
        path.write_bytes(texts[damage])
    with pytest.raises(DataError, match=r"damaged\.beton .*convert"):
        inspect_beton(path)


def test_pointer_outside_the_file_is_refused(grey_beton: Path, tmp_path: Path):
    content = bytearray(grey_beton.read_bytes())
    first_pointer = 24 + 2 * 1041 + 5
    content[first_pointer : first_pointer + 8] = (1 << 60).to_bytes(8, "little")
    path = tmp_path / "damaged.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match="contradict"):
        inspect_beton(path)


def test_side_file_of_another_file_is_refused(grey_beton: Path, tmp_path: Path):
    path = tmp_path / "copy.beton"
    path.write_bytes(grey_beton.read_bytes())
    Path(f"{path}.json").write_text(json.dumps({"classes": ["a"], "num_samples": 7}))
    with pytest.raises(DataError, match="another file"):
        inspect_beton(path)
