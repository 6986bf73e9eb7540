"""Hangs are reported with the rank that hangs; slow ranks are left alone.

All launches run at the same time, forked off one process: they mostly sleep.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE, TIMEOUT = 3, 3.0
LIMIT = 60  # seconds until whatever still lives is killed

# --- what the ranks do, in the forked processes ------------------------------------------------


def _train(rank: int, befall: Callable[[int, int], None]) -> None:
    """Six steps, before each of which something may befall a rank."""
    import torch
    import torch.distributed as dist

    from mlomae.distributed import watchdog

    for step in range(6):
        watchdog.mark(f"drawing pretrain {step}")
        befall(rank, step)
        watchdog.mark(f"pretrain step {step}")
        dist.all_reduce(torch.ones(1))


def _sleep(hung: int) -> Callable[[int, int], None]:
    return lambda rank, step: time.sleep(1000 * (rank == hung and step == 2))


def _stop(stopped: int) -> Callable[[int, int], None]:
    def befall(rank: int, step: int) -> None:
        if rank == stopped and step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

    return befall


def _be_slow(rank: int, step: int) -> None:
    """Twice the timeout between two collective calls, with a mark now and then."""
    from mlomae.distributed import watchdog

    if rank == 1 and step == 2:
        for batch in range(16):
            watchdog.mark(f"evaluating batch {batch}")
            time.sleep(TIMEOUT / 8)


def _take_time(rank: int, step: int) -> None:
    """Steps that the driver can meet, to suspend the whole launch."""
    print(step, flush=True)
    time.sleep(0.5)


def _leave(rank: int, step: int) -> None:
    if rank == 2 and step == 2:
        raise SystemExit(0)


CASES = {
    "rank 1 sleeps": _sleep(1),
    "rank 0 sleeps": _sleep(0),
    "rank 1 stops": _stop(1),
    "rank 0 stops": _stop(0),
    "rank 2 leaves": _leave,
    "slow": _be_slow,
    "suspended": _take_time,
}


def _rank(case: str, rank: int, port: int) -> None:
    import torch.distributed as dist

    from mlomae.distributed import rendezvous as _rendezvous
    from mlomae.distributed import watchdog

    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    store = _rendezvous.meet(20.0)
    dist.init_process_group("gloo", timeout=_rendezvous.COLLECTIVE_TIMEOUT)
    del store
    try:
        with watchdog.watching(TIMEOUT):
            _train(rank, CASES[case])
    except SystemExit:
        time.sleep(1000)  # such as a rank that waits for its launcher
    dist.destroy_process_group()


def _fork(case: str, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{case} {rank}.log", os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _rank(case, rank, port)
    sys.exit()  # as a program ends: a thread that blocks the exit would be seen


def _main(folder: Path) -> None:
    """Fork all launches; `codes.json` says how each rank ended."""
    import torch  # noqa: F401  once for all of them

    from mlomae.distributed import rendezvous as _rendezvous  # noqa: F401

    children = {}
    for case in CASES:
        port = free_port()
        children[case] = [_fork(case, rank, port, folder) for rank in range(WORLD_SIZE)]
    _suspend(children["suspended"], folder / "suspended 0.log")
    (folder / "codes.json").write_text(json.dumps(_reap(children)))


def _suspend(children: list[int], log: Path) -> None:
    """Stop a whole launch for longer than the timeout, as some schedulers do."""
    while not log.exists() or "1" not in log.read_text():
        time.sleep(0.05)
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(1.5 * TIMEOUT)
    for child in children:
        os.kill(child, signal.SIGCONT)


def _reap(children: dict[str, list[int]]) -> dict[str, list[int]]:
    """Exit codes; whoever waits for others that have ended is killed, as a launcher would."""
    codes = {case: [-signal.SIGKILL] * WORLD_SIZE for case in children}
    running = {(case, rank): c for case in children for rank, c in enumerate(children[case])}
    deadline = time.monotonic() + LIMIT
    while not _are_victims(running) and time.monotonic() < deadline:
        for (case, rank), child in list(running.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[case][rank] = os.waitstatus_to_exitcode(status)
                del running[case, rank]
        time.sleep(0.05)
    for child in running.values():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return codes


def _are_victims(running: Iterable[tuple[str, int]]) -> bool:
    """Whether only ranks are left that the names of their cases name."""
    return all(case.startswith(f"rank {rank} ") for case, rank in running)


# --- what comes of it ------------------------------------------------------------------------


class Launches:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[str, list[int]] = json.loads((folder / "codes.json").read_text())

    def log(self, case: str, rank: int) -> str:
        return (self.folder / f"{case} {rank}.log").read_text()

    def sentence(self, case: str) -> str:
        """The one sentence of all ranks."""
        logs = "".join(self.log(case, rank) for rank in range(WORLD_SIZE))
        (sentence,) = re.findall("^error: hang: (.*)$", logs, re.MULTILINE)
        return str(sentence)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    folder = tmp_path_factory.mktemp("watchdog")
    environment = os.environ | {
        **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        # Each connection asks for its address's name: a lost query would cost five seconds.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }
    command = [sys.executable, "-m", "tests.distributed.test_watchdog", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=2 * LIMIT)
    return Launches(folder)


HOST = re.escape(socket.gethostname())
FIX = r"; launch again with --resume, or raise monitor\.hang_timeout \(3 s\) if .*"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sleeps_is_named(launches: Launches, rank: int):
    case, others = f"rank {rank} sleeps", "ranks 1-2" if rank == 0 else "ranks 0, 2"
    assert launches.codes[case] == [75, 75, 75]
    what = (
        rf"rank {rank} on {HOST} has not left `drawing pretrain 2` for [3-9] s, and {others} wait "
        rf"in all_reduce \(`pretrain step 2`\)"
    )
    assert re.fullmatch(what + FIX, launches.sentence(case))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_stack_of_a_rank_that_sleeps_is_printed(launches: Launches, rank: int):
    log = launches.log(f"rank {rank} sleeps", rank)
    stack = log.partition(f"rank {rank} on {socket.gethostname()} stands here:")[2]
    assert "test_watchdog.py" in stack and "in _train" in stack and "<lambda>" in stack
    first = launches.log(f"rank {rank} sleeps", 0)
    assert "rank 0 on" in first and "in _train" in first


def test_a_rank_that_is_stopped_is_named(launches: Launches):
    assert launches.codes["rank 1 stops"] == [75, -signal.SIGKILL, 75]
    what = (
        rf"rank 1 on {HOST} has given no sign for [3-9] s \(last seen in `[a-z 0-9]*`\), and ranks "
        r"0, 2 wait in all_reduce \(`pretrain step 2`\)"
    )
    assert re.fullmatch(what + FIX, launches.sentence("rank 1 stops"))


def test_rank_0_that_is_stopped_with_the_store_is_named(launches: Launches):
    assert launches.codes["rank 0 stops"] == [-signal.SIGKILL, 75, 75]
    what = (
        r"rank 0 on 127\.0\.0\.1 \(port \d+\) has given no sign for [2-9] s, and rank 1 waits in "
        rf"all_reduce \(`pretrain step 2`\) on {HOST}"
    )
    assert re.fullmatch(what + FIX, launches.sentence("rank 0 stops"))
    assert "in all_reduce" in launches.log("rank 0 stops", 1)  # its stack


def test_a_rank_that_ended_alone_is_named(launches: Launches):
    assert launches.codes["rank 2 leaves"] == [75, 75, -signal.SIGKILL]
    what = rf"rank 2 on {HOST} has ended, and ranks 0-1 wait in all_reduce \(`pretrain step 2`\)"
    assert re.fullmatch(what + FIX, launches.sentence("rank 2 leaves"))


@pytest.mark.parametrize("case", ["slow", "suspended"])
def test_a_launch_that_is_slow_or_was_suspended_goes_on_and_ends(launches: Launches, case: str):
    assert launches.codes[case] == [0, 0, 0]
    assert not any("error: hang" in launches.log(case, rank) for rank in range(WORLD_SIZE))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
