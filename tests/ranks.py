"""Run a function on several real processes that talk over gloo, and collect what it returns."""

import faulthandler
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed would import the compiler for its first engine
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.ranks", function, str(folder), str(timeout)]
    processes = []
    for rank in range(world_size):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(
            subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        )
    try:
        codes = [process.wait(timeout + 30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "\n".join((folder / f"rank{r}.log").read_text()[-4000:] for r in range(world_size))
        raise AssertionError(f"ranks ended with {codes}\n{logs}")
    return [torch.load(folder / f"result{r}.pt", weights_only=False) for r in range(world_size)]


def _main() -> None:
    function, folder, timeout = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    faulthandler.dump_traceback_later(timeout, exit=True)
    from mlomae._ranks import start_ranks

    start_ranks()
    module, name = function.split(":")
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = getattr(importlib.import_module(module), name)(**arguments)
    torch.save(result, folder / f"result{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
