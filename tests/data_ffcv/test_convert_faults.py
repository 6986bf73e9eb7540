"""A conversion that is stopped, killed or out of disk leaves nothing under the final name."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from data_ffcv import DataError, inspect_beton
from data_ffcv.beton.info import side_path
from data_ffcv.conversion import staging as staging_module
from data_ffcv.conversion.staging import Staging, unlink_abandoned
from data_ffcv.convert import convert, held_out_path, main
from tests.data_ffcv.conftest import smooth_image

ROOT = Path(__file__).parents[2]


def start_command(*arguments: object, max_bytes: int | None = None) -> subprocess.Popen:
    """Starts a conversion; `max_bytes` limits the size of its files."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
        if max_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))

    command = [sys.executable, "-m", "data_ffcv.convert", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=prepare
    )


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
    """An image under many names, which take seconds to convert."""
    folder = tmp_path_factory.mktemp("large") / "a"
    folder.mkdir()
    smooth_image(np.random.default_rng(0), 300, 400).save(folder / "0.jpg")
    for number in range(1, 3000):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    return folder.parent


@pytest.mark.parametrize(
    ("number", "num_bytes"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGKILL, 10_000_000),
        (signal.SIGTERM, 10_000_000),
        (signal.SIGHUP, 10_000_000),
        (signal.SIGINT, 10_000_000),
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
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Staging(tmp_path / "o.beton") as other:
        with pytest.raises(DataError, match="is being written by another conversion"):
            convert("fashion-mnist", idx_folder, other.out, part="test")
        monkeypatch.setattr(os, "getpid", lambda: 1)  # locks are the open file's, not the process's
        convert("fashion-mnist", idx_folder, other.out, part="test")
        assert other.path.exists()
    assert inspect_beton(other.out).num_samples == 20


def test_full_disk_is_one_sentence_and_leaves_nothing(large_folder: Path, tmp_path: Path):
    """A limit on the size of files stands for the disk: writing fails in the middle."""
    process = start_command("imagefolder", large_folder, tmp_path / "o.beton", max_bytes=12_000_000)
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
    monkeypatch.setattr(staging_module, "create_locked", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(DataError, match=r"o\.beton cannot be written \(No space left on device\)"):
        convert("fashion-mnist", idx_folder, tmp_path / "o.beton", part="test")
    assert not list(tmp_path.iterdir())


def test_missing_folders_are_made_once_the_rest_is_known_to_work(idx_folder: Path, tmp_path: Path):
    out = tmp_path / "new" / "er" / "o.beton"
    with pytest.raises(DataError, match="nowhere"):
        convert("fashion-mnist", "nowhere", out)
    assert not list(tmp_path.iterdir())
    assert convert("fashion-mnist", idx_folder, out, part="test").path == out


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_that_appears_meanwhile_is_not_replaced_unasked(
    idx_folder: Path, tmp_path: Path, overwrite: bool
):
    """Both files of a split, so that the first to be published is taken back."""
    out = tmp_path / "o.beton"

    def interfere(done: int, total: int) -> None:
        out.write_text("precious")

    settings = {"split": 0.5, "overwrite": overwrite, "on_progress": interfere}
    if overwrite:
        convert("fashion-mnist", idx_folder, out, **settings)
        assert inspect_beton(out).num_samples + inspect_beton(held_out_path(out)).num_samples == 203
        return
    with pytest.raises(DataError, match=r"o\.beton was written by somebody else .*--overwrite"):
        convert("fashion-mnist", idx_folder, out, **settings)
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("appears", [False, True])
def test_file_system_without_hard_links(
    idx_folder: Path, tmp_path: Path, appears: bool, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "o.beton"

    def link(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def interfere(done: int, total: int) -> None:
        if appears:
            out.write_text("precious")

    monkeypatch.setattr(os, "link", link)
    settings = {"part": "test", "on_progress": interfere}
    if appears:
        with pytest.raises(DataError, match="written by somebody else"):
            convert("fashion-mnist", idx_folder, out, **settings)
        assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]
    else:
        assert convert("fashion-mnist", idx_folder, out, **settings).num_samples == 20
        assert len(list(tmp_path.iterdir())) == 2


def test_failure_while_overwriting_keeps_the_old_pair(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "o.beton"
    convert("fashion-mnist", idx_folder, out, part="test")
    before = [path.read_bytes() for path in (out, side_path(out))]

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match="Input/output error"):
        convert("fashion-mnist", idx_folder, out, overwrite=True)
    assert [path.read_bytes() for path in (out, side_path(out))] == before


@pytest.mark.parametrize("taken", ["o.beton", "o.beton.json", "o.beton.report.txt"])
def test_folder_in_the_way_is_named_before_any_work(tmp_path: Path, taken: str):
    (tmp_path / taken).mkdir()
    with pytest.raises(DataError, match=rf"{taken} is a folder; give another name"):
        convert("fashion-mnist", "nowhere", tmp_path / "o.beton", overwrite=True)


def test_file_that_is_removed_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another conversion looks between creation and lock, and takes the file for abandoned."""
    flock, calls = fcntl.flock, []

    def look_first(file: BinaryIO, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            unlink_abandoned(next(tmp_path.glob(".*.tmp")))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", look_first)
    with Staging(tmp_path / "o.beton") as staging:
        assert (
            len(calls) == 3 and staging.path.stat().st_ino == os.fstat(staging.file.fileno()).st_ino
        )
        unlink_abandoned(staging.path)
        assert staging.path.exists()


def test_living_file_of_an_abandoned_name_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening and locking an abandoned file, somebody else removes and replaces it."""
    path, flock = tmp_path / ".o.beton.1.tmp", fcntl.flock
    path.touch()

    def be_late(file: BinaryIO, how: int) -> None:
        os.rename(path, tmp_path / "gone")  # keeps its inode from being given out again
        path.write_text("alive")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", be_late)
    unlink_abandoned(path)
    assert path.read_text() == "alive"


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        (1, "no file was written"),
        (2, "written completely: {rest}"),
        (3, "written completely: {both}"),
    ],
)
def test_interrupt_while_files_get_their_names_says_what_is_there(
    idx_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    moment: int,
    says: str,
):
    """Before the first file of a split, between the two, and behind them."""
    out, publish, calls = tmp_path / "o.beton", Staging.publish, []

    def interrupt(staging: Staging, overwrite: bool) -> None:
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        publish(staging, overwrite)
        if len(calls) == moment - 1 == 2:
            raise KeyboardInterrupt

    convert("fashion-mnist", idx_folder, out, part="test", split=0.5)
    monkeypatch.setattr(Staging, "publish", interrupt)
    command = ["convert", "fashion-mnist", str(idx_folder), str(out), "--split", "0.5"]
    monkeypatch.setattr(sys, "argv", [*command, "--overwrite"])
    assert main() == 130
    rest = held_out_path(out)
    expected = says.format(rest=rest, both=f"{out}, {rest}")
    assert capfd.readouterr().err.splitlines()[-1] == f"error: stopped; {expected}"
    sizes = [inspect_beton(path).num_samples > 20 for path in (out, rest)]
    assert sizes == [moment == 3, moment >= 2]
