"""Which checkpoint a run goes on from: the newest that is sound."""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlomae.checkpoint.folders import complete_checkpoints
from mlomae.checkpoint.writer import STATE_FILE, checksum, point_to, text_checksum
from mlomae.distributed.collectives import first_problem, from_first_rank, gather_objects
from mlomae.distributed.watchdog import mark
from mlomae.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 2


class Damaged(Exception):
    """A checkpoint that is not what was written, and why.

    Attributes:
        is_missing: a file is not there, as this rank sees it.
    """

    def __init__(self, reason: str, is_missing: bool = False) -> None:
        super().__init__(reason)
        self.is_missing = is_missing


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there in full size, as one rank sees it.

    Raises:
        UserError: there are checkpoints, but none is sound or of this version.
    """
    problems = {}
    for checkpoint in reversed(complete_checkpoints(folder)):
        try:
            _check_sizes(checkpoint, read_state(checkpoint))
            return checkpoint
        except Damaged as damage:
            problems[checkpoint] = str(damage)
    _refuse_if_any(folder, problems)
    return None


def choose(folder: Path) -> Path | None:
    """The newest checkpoint that all ranks find sound, to the last bit. All ranks must call.

    Damaged ones that are newer get another name, and stay.

    Raises:
        UserError: there are checkpoints, but none is sound or of this version; or a rank cannot
            read what others can.
    """
    for cut_short in folder.glob("step_*.tmp"):
        logger.info("ignored %s: its writing was cut short", cut_short)
    checkpoints = from_first_rank(complete_checkpoints(folder))  # NFS may lag behind on one node
    problems: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        problem = _agreed_problem(checkpoint)
        if problem is None:
            _set_aside(problems, checkpoint)
            return checkpoint
        problems[checkpoint] = problem
    _refuse_if_any(folder, problems)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says.

    Raises:
        Damaged: it is not what was written.
        UserError: it cannot be read, or another version of this program wrote it.
    """
    with _reading(checkpoint, STATE_FILE):
        text = (checkpoint / STATE_FILE).read_bytes()
    try:
        state: dict[str, Any] = json.loads(text)
        version = state["format"]
        writer = state["versions"]["mlomae"]
        if version == FORMAT and state.pop("crc32") != text_checksum(state):
            raise ValueError("its text is not what was written")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{STATE_FILE}: {error}") from None
    if version != FORMAT:
        raise UserError(
            f"{checkpoint} has format {version}, this version reads {FORMAT}: "
            f"resume with mlomae {writer}"
        )
    return state


def _agreed_problem(checkpoint: Path) -> str | None:
    """What any rank finds wrong; each one reads its share of the files.

    Raises:
        UserError: a rank cannot read what others can, on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    damage: tuple[str, bool] | None = None  # what is wrong, and whether a file is missing
    refusal = None
    try:
        state = read_state(checkpoint)
        _check_sizes(checkpoint, state)
        _check_sums(checkpoint, dict(list(state["files"].items())[rank::world_size]))
    except Damaged as error:
        damage = str(error), error.is_missing
    except UserError as error:
        refusal = f"rank {rank} on {socket.gethostname()}: {error}"
    if refused := first_problem(refusal):
        raise UserError(refused[1])
    problems = [
        (number, problem) for number, problem in enumerate(gather_objects(damage)) if problem
    ]
    if not problems:
        return None
    number, (text, is_missing) = problems[0]
    if is_missing and number and all(missing for _, (_, missing) in problems):
        raise UserError(  # the first rank sees it, so it is there
            f"rank {number} does not see all of {checkpoint} ({text}): fix the mount of its "
            "host, and launch again"
        )
    return text


def _check_sizes(checkpoint: Path, state: Mapping[str, Any]) -> None:
    for name, sums in state["files"].items():
        with _reading(checkpoint, name):
            size = (checkpoint / name).stat().st_size
        if size != sums["bytes"]:
            raise Damaged(f"{name}: {size} of {sums['bytes']} bytes")


def _check_sums(checkpoint: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    for name, sums in files.items():
        mark(f"reading {name}")
        with _reading(checkpoint, name):
            crc32 = checksum(checkpoint / name)
        if crc32 != sums["crc32"]:
            raise Damaged(f"{name}: its bytes are not those that were written")


@contextmanager
def _reading(checkpoint: Path, name: str) -> Iterator[None]:
    """A file that is not there is damage; one that cannot be read may be well in a minute."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"{name}: {error.strerror}", is_missing=True) from None
    except OSError as error:
        raise UserError(
            f"{checkpoint / name} cannot be read ({error.strerror}): fix its disk, mount or "
            "rights, and launch again"
        ) from None


def _set_aside(problems: Mapping[Path, str], chosen: Path) -> None:
    """Say what is skipped, and free its name for the run that will come there once more.

    Raises:
        UserError: the folder lacks rights or space, on all ranks.
    """
    refusal: str | None = None
    if dist.get_rank() == 0 and problems:
        try:
            point_to(chosen)
            for checkpoint, problem in problems.items():
                other = next(path for path in _names(checkpoint) if not path.exists())
                checkpoint.rename(other)
                logger.warning(
                    "skipped %s: damaged (%s); it is now called %s", checkpoint, problem, other.name
                )
        except OSError as error:
            refusal = (
                f"a damaged checkpoint in {chosen.parent} cannot be renamed ({error.strerror}): "
                "fix rights or space of the folder"
            )
    if refused := first_problem(refusal):
        raise UserError(refused[1])


def _names(checkpoint: Path) -> Iterator[Path]:
    yield checkpoint.with_suffix(".damaged")
    number = 2
    while True:
        yield checkpoint.with_suffix(f".damaged{number}")
        number += 1


def _refuse_if_any(folder: Path, problems: Mapping[Path, str]) -> None:
    if problems:
        what = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
        raise UserError(
            f"no checkpoint in {folder} can be read ({what}): bring one back from a copy, or "
            "choose another output_dir to start again"
        )
