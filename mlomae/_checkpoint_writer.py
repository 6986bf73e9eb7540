"""Writing a checkpoint from all ranks so that a full disk under one of them stops no other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from mlomae.errors import UserError


class Writer:
    """Writes of one rank: after the first that fails there are no more, until all ranks know.

    A rank that raised at once would leave the others waiting in the next collective call.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.problem: str | None = None

    def attempt(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Write, unless an earlier attempt failed."""
        if self.problem is not None:
            return
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save: RuntimeError
            self.problem = " ".join(str(error).split())[:200]

    def agree(self) -> None:
        """Raise on every rank what failed on any. All ranks must call."""
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self.problem)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if not failed:
            return
        folder = self.partial.parent
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)  # what it takes may be what lacks
        raise UserError(
            f"checkpoint {self.partial.stem} could not be written (rank {failed[0]}: "
            f"{problems[failed[0]]}): mend rights or space of {folder}, and continue from the "
            "checkpoint before it with --resume"
        )


def save_engine(engine: Any, folder: Path, tag: str, writer: Writer) -> None:
    """DeepSpeed's own files; it writes between two barriers, so a failure must not raise there."""
    files = engine.checkpoint_engine
    save, copy_script = files.save, engine._copy_recovery_script
    files.save = lambda *args, **kwargs: writer.attempt(save, *args, **kwargs)
    engine._copy_recovery_script = lambda path: writer.attempt(copy_script, path)
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        del files.save, engine._copy_recovery_script
