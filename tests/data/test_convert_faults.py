"""A conversion that is stopped, killed or out of disk leaves nothing under the final name."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_ffcv import DataError
from data_ffcv.convert import convert
from tests.data.conftest import smooth_image

ROOT = Path(__file__).parents[2]


def start_command(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_ffcv.convert", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def wait_until_writing(folder: Path, process: subprocess.Popen, num_bytes: int) -> None:
    """Returns when the temporary file has grown that long."""
    for _ in range(3000):
        sizes = [path.stat().st_size for path in folder.glob(".*.tmp")]
        assert process.poll() is None, process.stderr.read()
        if sizes and max(sizes) >= num_bytes:
            return
        time.sleep(0.01)
    raise AssertionError("the conversion did not begin")


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images under many names, which take seconds to convert."""
    folder = tmp_path_factory.mktemp("large") / "a"
    folder.mkdir()
    smooth_image(np.random.default_rng(0), 900, 1200).save(folder / "0.jpg")
    for number in range(1, 600):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    return folder.parent


@pytest.mark.parametrize(
    ("number", "num_bytes"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 30_000_000),
        (signal.SIGTERM, 30_000_000),
        (signal.SIGINT, 30_000_000),
    ],
)
def test_stopped_conversion_leaves_no_file_and_the_next_one_works(
    large_folder: Path, idx_folder: Path, tmp_path: Path, number: signal.Signals, num_bytes: int
):
    process = start_command("imagefolder", large_folder, tmp_path / "o.beton", "--num_workers", 2)
    wait_until_writing(tmp_path, process, num_bytes)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error
    left = list(tmp_path.iterdir())
    if number == signal.SIGKILL:
        assert process.returncode == -number and [path.suffix for path in left] == [".tmp"]
    else:
        assert process.returncode == 128 + number and not left
    convert("fashion-mnist", idx_folder, tmp_path / "o.beton", part="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.beton", "o.beton.json"]


def test_living_conversion_of_the_same_file_is_left_alone(
    large_folder: Path, idx_folder: Path, tmp_path: Path
):
    process = start_command("imagefolder", large_folder, tmp_path / "o.beton", "--num_workers", 1)
    try:
        wait_until_writing(tmp_path, process, 0)
        (other,) = tmp_path.glob(".*.tmp")
        convert("fashion-mnist", idx_folder, tmp_path / "o.beton", part="test")
        assert other.exists() and process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_full_disk_is_one_sentence_and_leaves_nothing(large_folder: Path, tmp_path: Path):
    """A limit on the size of files stands for the disk: writing fails in the middle."""
    limit = 40_000_000
    process = start_command(
        "imagefolder",
        large_folder,
        tmp_path / "o.beton",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: {tmp_path}/o.beton cannot be written (File")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_fills_up_at_the_end(
    idx_folder: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DataError, match=r"o\.beton cannot be written \(No space left on device\)"):
        convert("fashion-mnist", idx_folder, tmp_path / "o.beton", part="test")
    assert not list(tmp_path.iterdir())


def test_full_device(idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every write to /dev/full fails, also the one that closing the file repeats."""
    open_path = Path.open

    def open_full(path: Path, mode: str = "r", *arguments: object, **options: object) -> object:
        if mode == "x+b":
            return open_path(Path("/dev/full"), "wb")
        return open_path(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DataError, match=r"o\.beton cannot be written \(No space left on device\)"):
        convert("fashion-mnist", idx_folder, tmp_path / "o.beton", part="test")
    assert not list(tmp_path.iterdir())
