"""Run a function on several real processes that talk over gloo, and collect what it returns.

A process costs five seconds of imports when it is started the usual way. A fork of a server that
has them costs none.
"""

import faulthandler
import importlib
import multiprocessing
import os
import random
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed would import the compiler for its first engine
    "MASTER_ADDR": "127.0.0.1",
}


@cache
def warm_context() -> Any:
    """The context whose processes are forks of one that has imported `tests.warm`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}):
        context.Process(target=int).start()  # the first process starts the server
    return context


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives to connections.

    One of the system's could be taken again before a launch has come so far as to listen.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


def run_ranks(
    function: str, world_size: int, folder: Path, *, timeout: float = 240, **arguments: Any
) -> list[Any]:
    """Call `package.module:function(**arguments)` on every rank.

    Args:
        function: what to call, after the process group is initialised.
        world_size: number of processes.
        folder: scratch for arguments and results.
        timeout: seconds until each process prints its stack and exits.

    Returns:
        What the function returned, by rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    port = free_port()
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        numbers = {**ranks, "LOCAL_SIZE": world_size, "MASTER_PORT": port}
        environment = os.environ | ENVIRONMENT | {k: str(v) for k, v in numbers.items()}
        given = (dict(environment), function, folder, timeout)
        processes.append(warm_context().Process(target=_rank, args=given))
        processes[-1].start()
    try:
        for process in processes:
            process.join(timeout + 30)
    finally:
        for process in processes:
            process.kill()
    if any(process.exitcode for process in processes):
        logs = "\n".join((folder / f"rank{r}.log").read_text()[-4000:] for r in range(world_size))
        raise AssertionError(f"ranks ended with {[p.exitcode for p in processes]}\n{logs}")
    return [torch.load(folder / f"result{r}.pt", weights_only=False) for r in range(world_size)]


def _rank(environment: dict[str, str], function: str, folder: Path, timeout: float) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with (folder / f"rank{environment['RANK']}.log").open("wb", 0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
    from mlomae.distributed.start import start_ranks

    start_ranks()
    module, name = function.split(":")
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = getattr(importlib.import_module(module), name)(**arguments)
    torch.save(result, folder / f"result{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
