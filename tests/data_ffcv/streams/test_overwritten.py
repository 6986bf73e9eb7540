"""Files that somebody writes over while they are read."""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_ffcv import DataError, WholeImages
from data_ffcv.beton.images import BetonImages
from tests.data_ffcv.streams.draws import assert_same, draw, eval_loader, stream

BACKENDS = [
    "threads",
    pytest.param(
        "ffcv",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed"
        ),
    ),
]


def copied(beton: Path, folder: Path) -> Path:
    for suffix in ("", ".json"):
        shutil.copy(f"{beton}{suffix}", f"{folder / 'live.beton'}{suffix}")
    return folder / "live.beton"


def truncate_before(monkeypatch: pytest.MonkeyPatch, path: Path, batch: int) -> None:
    """Truncate the file just before a batch, counted from 0, is decoded."""
    check, batches = BetonImages.check_unchanged, itertools.count()

    def truncate_and_check(images: BetonImages) -> None:
        if next(batches) == batch:
            os.truncate(path, 5000)
        check(images)

    monkeypatch.setattr(BetonImages, "check_unchanged", truncate_and_check)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_of_a_truncated_file_ends_with_a_sentence_and_goes_on_once_it_is_back(
    grey_beton: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
):
    path, size = copied(grey_beton, tmp_path), grey_beton.stat().st_size
    sentence = rf"live\.beton has shrunk from {size} to 5000 bytes while it was read; put the whole"
    truncate_before(monkeypatch, path, batch=3)
    with stream(path, backend=backend) as batches:
        drawn = list(itertools.islice(batches, 3))
        with pytest.raises(DataError, match=sentence):
            next(batches)
    monkeypatch.undo()
    shutil.copy(grey_beton, path)
    drawn += draw(path, 3, backend=backend, start_batch=3)
    assert_same(drawn, draw(grey_beton, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_evaluation_of_a_truncated_file_ends_with_a_sentence(
    grey_beton: Path, tmp_path: Path, backend: str
):
    path = copied(grey_beton, tmp_path)
    loader = eval_loader(path, backend=backend)
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=r"live\.beton has shrunk from .* to 5000 bytes"):
        list(loader)


def test_whole_images_of_a_truncated_file_end_with_a_sentence(
    segmentation_beton: Path, tmp_path: Path
):
    path = copied(segmentation_beton, tmp_path)
    images = iter(WholeImages(path))
    next(images)
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=r"live\.beton has shrunk from .* to 5000 bytes"):
        next(images)


def test_a_longer_file_written_over_the_open_one_is_refused(
    grey_beton: Path, segmentation_beton: Path, tmp_path: Path
):
    path = copied(segmentation_beton, tmp_path)
    images = iter(WholeImages(path))
    next(images)
    sizes = segmentation_beton.stat().st_size, grey_beton.stat().st_size
    path.write_bytes(grey_beton.read_bytes())
    with pytest.raises(DataError, match="has grown from {} to {} bytes".format(*sizes)):
        next(images)


RACE = """
import faulthandler, os, sys
from data_ffcv.pixels.images import BetonImages
from data_ffcv.pixels.images import BetonImages
from tests.data_ffcv.streams.draws import eval_loader

faulthandler.enable()
check = BetonImages.check_unchanged

def check_and_truncate(images):
    check(images)
    os.truncate(sys.argv[1], 5000)

BetonImages.check_unchanged = check_and_truncate
list(eval_loader(sys.argv[1]))
"""


def test_a_file_truncated_within_a_batch_ends_the_process_with_its_stacks(
    grey_beton: Path, tmp_path: Path
):
    path = copied(grey_beton, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -7, done.stderr  # SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr and "in _augment_rows" in done.stderr
