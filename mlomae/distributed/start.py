"""The processes of one launch: which one this is, how they start, and how they speak."""

import faulthandler
import logging
import os
import sys
import time
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import groups
from rich.console import Console
from rich.logging import RichHandler
from torch.distributed import DistError

from mlomae.distributed.rendezvous import MEETING_TIMEOUT, meet
from mlomae.errors import UserError

LAUNCHER_GRACE = 4.0  # seconds in which DeepSpeed's launcher surely notices that a rank has ended


def report(error: Exception) -> None:
    """Print an error once per node.

    Most errors meet all ranks alike, and the launcher ends the others as soon as one is gone. Only
    a rank that failed alone outlives the wait, and says so.
    """
    if _local_rank():
        time.sleep(LAUNCHER_GRACE)
    rank = f"rank {launched_rank()}: " if _local_rank() else ""
    print(f"error: {rank}{error}", file=sys.stderr, flush=True)


def report_lost_rank(error: Exception) -> None:
    """Print that another rank has ended, once the launcher has seen with what it did."""
    time.sleep(LAUNCHER_GRACE)
    reason = " ".join(str(error).split())[:200]
    print(
        f"error: rank {launched_rank()} has lost another rank ({reason}): the other's last lines "
        "say why; launch again with --resume",
        file=sys.stderr,
        flush=True,
    )


def start_ranks(collective_timeout: timedelta | None = None) -> None:
    """Join the process group, over NCCL where there are GPUs, else over gloo.

    Args:
        collective_timeout: after which a collective call fails; None for DeepSpeed's.

    Raises:
        UserError: no launcher has started this process.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank())
        _join("nccl", collective_timeout)
        return
    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    # Compiled at the first start, of use to inference alone, and every rank leaves 66 MB of it in
    # /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _join("gloo", collective_timeout)


def _join(backend: str, timeout: timedelta | None) -> None:
    store = meet()
    try:
        deepspeed.init_distributed(backend, timeout=timedelta(seconds=MEETING_TIMEOUT))
        # ZeRO's collectives run in a group that DeepSpeed makes, which takes torch's default else.
        for group in (dist.group.WORLD, groups._clone_world_group()):
            dist.distributed_c10d._set_pg_timeout(timeout or default_pg_timeout, group)
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        # Without a launcher's variables DeepSpeed asks MPI.
        raise UserError(
            f"no launcher has started this: run `deepspeed {sys.argv[0]} ...`, or use torchrun"
        ) from None
    except DistError as error:
        raise UserError(
            f"the ranks could not join ({' '.join(str(error).split())[-300:]}): look at the logs "
            "of all hosts"
        ) from None
    del store  # torch's is open now


def set_up_logging() -> None:
    """Log to stderr: rank 0 what happens, the others what goes wrong."""
    # the stacks of a crash, such as of a data file cut short while it is mapped
    faulthandler.enable(sys.__stderr__)  # type: ignore[arg-type]
    rank = launched_rank()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%X")
    else:  # a job's log file: one line each, whatever their length
        handler = logging.StreamHandler()
        prefix = f"%(asctime)s %(levelname)s {prefix}"
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"{prefix}%(message)s", handlers=[handler], force=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def launched_rank() -> int:
    """This process among all, known before the process group is joined."""
    return int(os.environ.get("RANK", "0"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_world_size() -> int:
    """Number of processes, known before the process group is joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))
