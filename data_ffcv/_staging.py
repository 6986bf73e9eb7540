"""Files that appear under their name only when they are complete."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data_ffcv.beton import side_path
from data_ffcv.errors import DataError

_BUFFER_BYTES = 1 << 20


def report_path(path: Path) -> Path:
    """Path of the list of images that were skipped or changed on the way into a ``.beton``."""
    return path.with_name(path.name + ".report.txt")


class Staging:
    """A ``.beton``, its side file and its report under temporary names, until `publish`.

    The temporary file is locked while its process lives; what dead processes left is removed.

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
        self.path = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        for stale in out.parent.glob(".*.tmp"):
            if stale.name.startswith(f".{out.name}.") and _is_abandoned(stale):
                _unlink(stale)
        try:
            self.file: BinaryIO = self.path.open("x+b", buffering=_BUFFER_BYTES)
        except FileExistsError:
            raise DataError(
                f"{out} is being written by another conversion; wait for it to end"
            ) from None
        _lock(self.file)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes whatever was not published."""
        with suppress(OSError):  # a full disk again, but what is published was synced before
            self.file.close()
        _unlink(self.path)

    def write_side_file(self, content: dict[str, Any]) -> None:
        """Writes the JSON file that is to stand beside the ``.beton``."""
        _write_text(side_path(self.path), json.dumps(content, indent=2) + "\n")

    def write_report(self, lines: list[str]) -> None:
        """Writes the report, if there is anything to report."""
        if lines:
            _write_text(report_path(self.path), "\n".join(lines) + "\n")

    def publish(self) -> None:
        """Gives the finished files their names, which replaces older ones."""
        for path in (side_path, report_path):
            path(self.out).unlink(missing_ok=True)  # would contradict the new data
        names = [side_path, lambda path: path]
        if self.out.exists():
            names.reverse()  # or the new side file would for a moment describe the old data
        if report_path(self.path).exists():
            names.insert(0, report_path)
        for name in names:
            os.replace(name(self.path), name(self.out))


def _lock(file: BinaryIO) -> bool:
    """Takes the lock that goes with the process; False if somebody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also where a file system knows no locks
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _lock(file)
    except OSError:
        return False


def _unlink(path: Path) -> None:
    for part in (path, side_path(path), report_path(path)):
        part.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
