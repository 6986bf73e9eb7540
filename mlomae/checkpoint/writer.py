"""Writing a checkpoint from all ranks at once, in the background."""

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mlomae.checkpoint.files import replace_text, sync
from mlomae.checkpoint.folders import save_tensors
from mlomae.distributed.collectives import first_problem, gather_objects
from mlomae.errors import UserError

STATE_FILE = "state.json"
_CHUNK = 2**24  # bytes read at once for a checksum


class Saving:
    """A checkpoint on its way to the disk; a thread writes this rank's files.

    What fails is kept until all ranks know: one that raised at once would leave the others waiting
    in the next collective call. All ranks must make it together.

    Args:
        final: the folder that the checkpoint becomes.
        files: this rank's, by path in the folder: tensors on the CPU, or a text.
        state: what `state.json` says besides the list of files.

    Raises:
        UserError: there is no room to begin in, on all ranks.
    """

    def __init__(
        self, final: Path, files: Mapping[str, Mapping[str, Tensor] | str], state: dict[str, Any]
    ) -> None:
        self.final, self.partial = final, final.with_suffix(".tmp")
        self._files, self._state = files, state
        self._sums: dict[str, dict[str, int]] = {}
        self._problem: str | None = None
        if dist.get_rank() == 0:
            self._attempt(self._make_room)
        self._agree()  # before others write into it
        self._thread = Thread(target=self._attempt, args=(self._write,), daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on the disk, or could not be written."""
        return not self._thread.is_alive()

    def publish(self) -> None:
        """Wait for the files of all ranks, and give the folder its name. All ranks must call.

        Raises:
            UserError: some rank could not write, on all ranks; older checkpoints are untouched.
        """
        self._thread.join()
        if self._problem is None and self._sums.keys() != self._files.keys():
            self._problem = "the thread that writes has ended early"
        self._files = {}  # their memory
        of_all_ranks = self._agree()
        if dist.get_rank() == 0:
            files = {
                name: sums for sums_by_name in of_all_ranks for name, sums in sums_by_name.items()
            }
            self._attempt(lambda: self._complete(dict(sorted(files.items()))))
        self._agree()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, the other ranks have to hear of it
            self._problem = " ".join(str(error).split())[:200] or type(error).__name__

    def _agree(self) -> list[dict[str, dict[str, int]]]:
        """What each rank has written; raises on every rank what failed on any."""
        failed = first_problem(self._problem)
        if failed is None:
            return gather_objects(self._sums)
        folder = self.partial.parent
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)  # what it takes may be what lacks
        raise UserError(
            f"checkpoint {self.final.name} could not be written (rank {failed[0]}: "
            f"{failed[1]}): fix rights or space of {folder}, and continue from "
            "the checkpoint before it with --resume"
        )

    def _make_room(self) -> None:
        """Remove what was cut short, and begin."""
        for leftover in self.partial.parent.glob("step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)  # a reader on NFS may hold a file of it
        self.partial.mkdir(parents=True, exist_ok=True)

    def _write(self) -> None:
        for name, content in self._files.items():
            file = self.partial / name
            file.parent.mkdir(exist_ok=True)
            if isinstance(content, str):
                file.write_text(content)
            else:
                save_tensors(dict(content), file)
            sync(file)
            self._sums[name] = {"bytes": file.stat().st_size, "crc32": checksum(file)}

    def _complete(self, files: dict[str, dict[str, int]]) -> None:
        file = self.partial / STATE_FILE
        state = self._state | {"files": files}
        file.write_text(json.dumps({"crc32": text_checksum(state), **state}, indent=1))
        sync(file)
        for folder in {(self.partial / name).parent for name in files} | {self.partial}:
            sync(folder)
        self.partial.rename(self.final)  # steps grow, so nothing sound bears this name yet
        sync(self.final.parent)
        point_to(self.final)


def point_to(checkpoint: Path) -> None:
    """Make `latest` name a checkpoint."""
    replace_text(checkpoint.parent / "latest", checkpoint.name)


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def text_checksum(state: dict[str, Any]) -> int:
    """CRC-32 of what `state.json` says."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
