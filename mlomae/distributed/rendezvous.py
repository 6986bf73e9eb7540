"""The start of a launch: all ranks meet within minutes, or a sentence says who is missing."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mlomae.errors import UserError

MEETING_TIMEOUT = 300.0  # seconds for the slowest host to start Python and to pass its checks
# Of a collective call. A hang is the watchdog's affair: it knows which rank, and it lets those wait
# whom a slow one keeps waiting.
COLLECTIVE_TIMEOUT = timedelta(days=1)


def meet(timeout: float = MEETING_TIMEOUT) -> Store | None:
    """Wait until every rank of the launch has come. All ranks must call.

    The store is the one that `torch.distributed` opens next, at the same address: keep it until
    the process group is joined.

    Args:
        timeout: seconds.

    Returns:
        None where no launcher has said where to meet, or the ranks have met before.

    Raises:
        UserError: rank 0 cannot be reached, or its port is in use, also by another launch; or some
            ranks have not come (names them, and the hosts of those that have).
    """
    if dist.is_initialized() or "MASTER_PORT" not in os.environ or "RANK" not in os.environ:
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout
    store = _open(rank, timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # their store outlives the ranks
    names = PrefixStore(f"meeting/{attempt}", store)
    keys = [str(number) for number in range(world_size)]
    try:
        if names.add(f"came/{rank}", 1) > 1:
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} serves another "
                "launch: give the launcher another --master_port (under torchrun: end it on all "
                "nodes, and launch again)"
            )
        names.set(str(rank), socket.gethostname())
        while not names.check(keys):
            if time.monotonic() > deadline:
                raise UserError(_who_is_missing(names, keys, timeout))
            time.sleep(0.1)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()} has lost rank 0 while it waited for the others "
            f"({' '.join(str(error).split())[:100]}): look at the log of the first host"
        ) from None
    return store


def _open(rank: int, timeout: float) -> Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if is_host:
            reason = "is in use" if "EADDRINUSE" in str(error) else f"cannot be opened ({error})"
            raise UserError(
                f"port {port} of {host} {reason}: give the launcher another --master_port"
            ) from None
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {host}:{port} within "
            f"{timeout:.0f} s: check that rank 0 has started, that the name leads to its host and "
            "that no firewall closes the port"
        ) from None


def _who_is_missing(names: Store, keys: list[str], timeout: float) -> str:
    came = {key: names.get(key).decode() for key in keys if names.check([key])}
    missing = [key for key in keys if key not in came]
    shown = ", ".join(missing[:16]) + (", ..." if len(missing) > 16 else "")
    return (
        f"only {len(came)} of {len(keys)} ranks came within {timeout:.0f} s, all of them from "
        f"{', '.join(sorted(set(came.values())))}; missing: {shown}: look at the log of the host "
        "that should have started them, or take it out of the hostfile"
    )
