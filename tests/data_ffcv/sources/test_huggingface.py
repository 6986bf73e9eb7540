"""Folders of Hugging Face `datasets`, saved and parquet."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError
from data_ffcv.sources import open_source
from tests.data_ffcv.sources.images import encode, random_pixels

NUM_ROWS = 7


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()

    def refuse(*_):
        raise AssertionError("the network is not needed")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return module


def make_rows(datasets, seed: int = 0, **more):
    """A `Dataset` as on the hub: encoded images, a ClassLabel, and a column nobody asks for."""
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    columns = {
        "img": [
            {"bytes": encode(Image.fromarray(pixels(seed + i)), "PNG"), "path": f"{i}.png"}
            for i in range(NUM_ROWS)
        ],
        "fine": [i % 3 for i in range(NUM_ROWS)],
        "id": list(range(100, 100 + NUM_ROWS)),
        "caption": ["x"] * NUM_ROWS,
    }
    features = {
        "img": datasets.Image(),
        "fine": names,
        "id": datasets.Value("int64"),
        "caption": datasets.Value("string"),
    }
    for name, (column, kind) in more.items():
        columns[name], features[name] = column, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pixels(number: int) -> np.ndarray:
    return random_pixels(4, 5, seed=number)


def check(source, seed: int = 0) -> None:
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [i % 3 for i in range(NUM_ROWS)] and len(source) == NUM_ROWS
    with ThreadPoolExecutor(4) as pool:
        for number, sample in enumerate(pool.map(source.read, range(NUM_ROWS))):
            assert np.array_equal(sample.image, pixels(seed + number))


def test_saved_dataset_and_dict(datasets, tmp_path: Path):
    rows = {"train": make_rows(datasets), "validation": make_rows(datasets, 50)}
    rows["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "two")
    check(open_source("huggingface", tmp_path / "one"))
    check(open_source("huggingface", tmp_path / "two"))
    check(open_source("huggingface", tmp_path / "two", part="validation"), 50)
    with pytest.raises(DataError, match="no part 'val'; choose one of train, validation"):
        open_source("huggingface", tmp_path / "two", part="val")


def test_rows_in_another_order_keep_their_labels(datasets, tmp_path: Path):
    rows = make_rows(datasets).select([5, 0, 3])
    rows.save_to_disk(tmp_path / "some")
    source = open_source("huggingface", tmp_path / "some")
    assert source.labels.tolist() == [2, 0, 0]
    assert np.array_equal(source.read(0).image, pixels(5))


@pytest.mark.parametrize(
    "files",
    [
        ("data/train-00000-of-00002", "data/train-00001-of-00002"),
        ("train/0", "train/1"),
        ("0", "1"),
    ],
)
def test_parquet(datasets, tmp_path: Path, files: tuple[str, str]):
    rows = make_rows(datasets)
    root = tmp_path / "root"
    for file, part in zip(files, (range(4), range(4, NUM_ROWS)), strict=True):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        rows.select(part).to_parquet(root / f"{file}.parquet")
    if files != ("0", "1"):
        other = root / files[0].replace("train", "test")
        other.parent.mkdir(exist_ok=True)
        rows.select([0]).to_parquet(f"{other}.parquet")
        with pytest.raises(DataError, match="no part 'val'; choose one of test, train"):
            open_source("huggingface", root, part="val")
    check(open_source("huggingface", root))


def test_bare_numbers_as_labels(datasets, tmp_path: Path):
    rows = make_rows(datasets).remove_columns("fine")
    rows = rows.remove_columns("id").add_column("label", [4, 0, 1, 2, 3, 0, 1])
    rows.save_to_disk(tmp_path / "rows")
    source = open_source("huggingface", tmp_path / "rows")
    assert source.classes == tuple("01234") and source.labels.tolist() == [4, 0, 1, 2, 3, 0, 1]
    (tmp_path / "classes").write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match="labels from 0 to 4 for 4 classes"):
        open_source("huggingface", tmp_path / "rows", classes=tmp_path / "classes")


def test_columns_that_cannot_be_told_apart(datasets, tmp_path: Path):
    rows, plain = make_rows(datasets), make_rows(datasets).remove_columns("fine")
    image, label = rows.features["img"], rows.features["fine"]
    no_image = [None] * NUM_ROWS
    cases = {
        r"several image columns \(img, two\)": make_rows(datasets, two=(no_image, image)),
        r"several label columns \(fine, two\)": make_rows(datasets, two=([0] * NUM_ROWS, label)),
        "no image column": rows.remove_columns("img"),
        "no label column": rows.select_columns(["img", "caption"]),
        "labels from -1 to -1": plain.add_column("fine", [-1] * NUM_ROWS, feature=label),
        "no label for some rows": make_rows(datasets, fine=([None] + [0] * 6, label)),
    }
    for number, (words, wrong) in enumerate(cases.items()):
        wrong.save_to_disk(tmp_path / str(number))
        with pytest.raises(DataError, match=words):
            open_source("huggingface", tmp_path / str(number))


def test_missing_image_and_folders_of_something_else(datasets, tmp_path: Path):
    rows = make_rows(datasets).remove_columns("img")
    kind = datasets.Image()
    rows.add_column("img", [None] * NUM_ROWS, feature=kind).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="the image is missing"):
        open_source("huggingface", tmp_path / "rows").read(0)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(DataError, match="neither a saved data set nor"):
        open_source("huggingface", tmp_path / "code")
    (tmp_path / "rows" / "data-00000-of-00001.arrow").write_bytes(b"half")
    with pytest.raises(DataError, match="rows cannot be opened by datasets"):
        open_source("huggingface", tmp_path / "rows")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_source("huggingface", tmp_path / "nowhere")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        open_source("huggingface", "nowhere")
