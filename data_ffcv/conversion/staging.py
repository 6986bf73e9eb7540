"""Files that appear under their name only when they are complete."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data_ffcv.beton.info import side_path
from data_ffcv.errors import DataError

_BUFFER_BYTES = 1 << 20
_NUM_TRIES = 10  # each lost to a process that looked at that very moment


def report_path(path: Path) -> Path:
    """Path of the list of images that were skipped or changed on the way into a ``.beton``."""
    return path.with_name(path.name + ".report.txt")


def check_outs(outs: list[Path], overwrite: bool) -> None:
    """Raises DataError unless files can come to stand there, with what stands beside them."""
    for out in outs:
        if out.suffix != ".beton":
            raise DataError(f"{out} must end in .beton; give it such a name")
        for path in (out, side_path(out), report_path(out)):
            if os.path.isdir(path):
                raise DataError(f"{path} is a folder; give another name")
            if os.path.lexists(path) and not overwrite:
                raise DataError(f"{path} exists; pass --overwrite or another name")
        parent = next(folder for folder in out.parents if os.path.lexists(folder))
        if not os.path.isdir(parent):
            raise DataError(f"{parent} is not a folder; give another place for {out.name}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise DataError(f"{parent} cannot be written to; allow that or give another folder")


@contextmanager
def explain_errors(out: Path) -> Iterator[None]:
    """Turns what the file system says while `out` is written into a sentence."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); free space on that disk, allow "
            "writing, or give another folder"
        ) from error


class Staging:
    """A ``.beton``, its side file and its report under temporary names, until `publish`.

    The temporary file is locked while its process lives; what dead processes left is removed.
    Folders that are missing are made.

    Attributes:
        out: The final name.
        path: The temporary one, in the same folder.
        file: Opened for writing and reading, empty.

    Raises:
        OSError: the folder cannot be written to.
        DataError: another conversion of this process writes the same file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        # On a shared disk locks may be a matter of one host.
        prefix = f".{out.name}.{socket.gethostname()}."
        self.path = out.with_name(f"{prefix}{os.getpid()}.tmp")
        self._created: list[Path] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(".*.tmp"):
            if stale.name.startswith(prefix):
                unlink_abandoned(stale)
        try:
            self.file: BinaryIO = create_locked(self.path)
        except FileExistsError:
            raise DataError(
                f"{out} is being written by another conversion; wait for it to end, or remove "
                f"{self.path} if there is none"
            ) from None

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes whatever was not published, and after an error what was, if it was new."""
        with suppress(OSError):  # a full disk again, but what is published was synced before
            self.file.close()
        _unlink(self.path)
        if error is not None:
            for path in self._created:
                path.unlink(missing_ok=True)

    def write_side_file(self, content: dict[str, Any]) -> None:
        """Writes the JSON file that is to stand beside the ``.beton``."""
        _write_text(side_path(self.path), json.dumps(content, indent=2) + "\n")

    def write_report(self, lines: list[str]) -> None:
        """Writes the report, if there is anything to report."""
        if lines:
            _write_text(report_path(self.path), "\n".join(lines) + "\n")

    def publish(self, overwrite: bool) -> None:
        """Gives the finished files their names, the data first.

        Raises:
            DataError: `out` has come to exist, and is not to be overwritten.
            OSError: a file cannot be renamed.
        """
        is_new = not os.path.lexists(self.out)
        if overwrite:
            self._replace_data()
        else:
            _link(self.path, self.out)
        if is_new:
            self._created = [self.out, side_path(self.out), report_path(self.out)]
        os.replace(side_path(self.path), side_path(self.out))
        if report_path(self.path).exists():
            os.replace(report_path(self.path), report_path(self.out))

    def _replace_data(self) -> None:
        """Replaces the data, with the old side file out of the way: its names are of other data."""
        side, aside = side_path(self.out), _aside(self.path)
        if side.exists():
            os.replace(side, aside)
        try:
            os.replace(self.path, self.out)
        except OSError:
            if aside.exists():
                os.replace(aside, side)
            raise
        report_path(self.out).unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _link(path: Path, out: Path) -> None:
    """Gives a file a second name, which must be a new one, even if it appears just now."""
    try:
        os.link(path, out)
    except OSError:  # on some file systems a file has one name
        if not os.path.lexists(out):
            os.replace(path, out)
            return
        if os.path.samestat(path.stat(), out.lstat()):  # done, but the answer was lost
            return
        raise DataError(
            f"{out} was written by somebody else meanwhile; pass --overwrite or another name"
        ) from None


def create_locked(path: Path) -> BinaryIO:
    """Creates a file with the lock that goes with the process."""
    for _ in range(_NUM_TRIES):
        file = path.open("x+b", buffering=_BUFFER_BYTES)
        with suppress(OSError):  # a file system without locks: then it never counts as abandoned
            # Waits for a process that saw the file before it was locked, and is removing it.
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            return file
        file.close()
    raise OSError(errno.ESTALE, "temporary files vanish from its folder")


def unlink_abandoned(path: Path) -> None:
    """Removes a temporary file, and what belongs to it, if its process is dead."""
    with suppress(OSError), path.open("r+b") as file:  # NFS locks need the right to write
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):  # or another has removed it, and a third one created it again
            _unlink(path)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> None:
    for part in (path, side_path(path), report_path(path), _aside(path)):
        part.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    # File names need not be UTF-8.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
