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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlomae import _rendezvous
from mlomae._signs import Sign, judge
from mlomae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WORLD_SIZE, TIMEOUT = 3, 3.0
LIMIT = 60  # seconds until whatever still lives is killed

# --- what the ranks do, in the forked processes ------------------------------------------------


def _train(rank: int, befall: Callable[[int, int], None]) -> None:
    """Six steps, before each of which something may befall a rank."""
    import torch
    import torch.distributed as dist

    from mlomae import watchdog

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
    from mlomae import watchdog

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

    from mlomae import _rendezvous, watchdog

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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(folder: Path) -> None:
    """Fork all launches; `codes.json` says how each rank ended."""
    import torch  # noqa: F401  once for all of them

    from mlomae import _rendezvous, watchdog  # noqa: F401

    children = {}
    for case in CASES:
        port = _free_port()
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
    command = [sys.executable, "-m", "tests.test_watchdog", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=2 * LIMIT)
    return Launches(folder)


HOST = re.escape(socket.gethostname())
MEND = r"; launch again with --resume, or raise monitor\.hang_timeout \(3 s\) if .*"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sleeps_is_named(launches: Launches, rank: int):
    case, others = f"rank {rank} sleeps", "ranks 1-2" if rank == 0 else "ranks 0, 2"
    assert launches.codes[case] == [75, 75, 75]
    told = (
        rf"rank {rank} on {HOST} has not left `drawing pretrain 2` for [3-9] s, and {others} wait "
        rf"in all_reduce \(`pretrain step 2`\)"
    )
    assert re.fullmatch(told + MEND, launches.sentence(case))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_stack_of_a_rank_that_sleeps_is_printed(launches: Launches, rank: int):
    log = launches.log(f"rank {rank} sleeps", rank)
    stack = log.partition(f"rank {rank} on {socket.gethostname()} stands here:")[2]
    assert "test_watchdog.py" in stack and "in _train" in stack and "<lambda>" in stack


def test_a_rank_that_is_stopped_is_named(launches: Launches):
    assert launches.codes["rank 1 stops"] == [75, -signal.SIGKILL, 75]
    told = (
        rf"rank 1 on {HOST} has given no sign for [3-9] s \(last seen in `[a-z 2]*`\), and ranks "
        r"0, 2 wait in all_reduce \(`pretrain step 2`\)"
    )
    assert re.fullmatch(told + MEND, launches.sentence("rank 1 stops"))


def test_rank_0_that_is_stopped_with_the_store_is_named(launches: Launches):
    assert launches.codes["rank 0 stops"] == [-signal.SIGKILL, 75, 75]
    told = (
        r"rank 0 on 127\.0\.0\.1 \(port \d+\) has given no sign for [2-9] s, and rank 1 waits in "
        rf"all_reduce \(`pretrain step 2`\) on {HOST}"
    )
    assert re.fullmatch(told + MEND, launches.sentence("rank 0 stops"))
    assert "in all_reduce" in launches.log("rank 0 stops", 1)  # its stack


def test_a_rank_that_ended_alone_is_named(launches: Launches):
    assert launches.codes["rank 2 leaves"] == [75, 75, -signal.SIGKILL]
    told = rf"rank 2 on {HOST} has ended, and ranks 0-1 wait in all_reduce \(`pretrain step 2`\)"
    assert re.fullmatch(told + MEND, launches.sentence("rank 2 leaves"))


@pytest.mark.parametrize("case", ["slow", "suspended"])
def test_a_launch_that_is_slow_or_was_suspended_goes_on_and_ends(launches: Launches, case: str):
    assert launches.codes[case] == [0, 0, 0]
    assert not any("error: hang" in launches.log(case, rank) for rank in range(WORLD_SIZE))


# --- who is to blame, by their signs -----------------------------------------------------------


def sign(rank: int, **differing: Any) -> Sign:
    """Of a rank that has waited in a collective call for a minute."""
    values = {
        "rank": rank,
        "host": f"node{rank // 2}",
        "beat": 9,
        "num_marks": 5,
        "place": "a step",
    }
    values |= {"waits_in": "barrier", "seconds": 60.0, "clock": 1000.0, "has_ended": False}
    return Sign(**values | differing)


def later(*signs: Sign, living: Iterable[int]) -> list[Sign]:
    """A second look ten seconds after: who lives has given another sign."""
    changes = {"beat": 10, "seconds": 70.0, "clock": 1010.0}
    return [replace(s, **changes) if rank in living else s for rank, s in enumerate(signs)]


def found(*signs: Sign, living: Iterable[int] = range(99), **options: float) -> Any:
    given = {"timeout": 60.0, "apart": 10.0, "now": 1010.0} | options
    return judge(signs, later(*signs, living=living), **given)


def test_all_ranks_in_one_call_are_all_named():
    verdict = found(*map(sign, range(4)))
    assert verdict.ranks == [0, 1, 2, 3]
    assert verdict.sentence == "all 4 ranks have not left `a step` (in barrier) for 70 s"


def test_of_ranks_that_all_wait_the_one_with_the_fewest_marks_is_named():
    verdict = found(sign(0), sign(1, num_marks=4, place="saving"), sign(2))
    assert verdict.ranks == [1]
    assert verdict.sentence == (
        "rank 1 on node0 has not left `saving` (in barrier) for 70 s, and ranks 0, 2 wait in "
        "barrier (`a step`)"
    )


def test_who_waits_for_nobody_is_named_though_it_has_the_most_marks():
    assert found(sign(0, waits_in="", num_marks=8), sign(1), sign(2)).ranks == [0]


def test_a_host_that_is_gone_is_named_with_its_ranks():
    verdict = found(*(sign(rank, clock=900.0) for rank in range(6)), living=(0, 1, 4, 5))
    assert verdict.sentence == (
        "ranks 2-3 on node1 have given no sign for 110 s (last seen in `a step`), and ranks 0-1, "
        "4-5 wait in barrier (`a step`)"
    )


def test_a_rank_that_comes_forward_keeps_all_alive():
    signs = [sign(0), sign(1), sign(2, clock=0.0)]
    moved = [*later(*signs[:1], living=[0]), replace(sign(1), beat=10, seconds=3.0), signs[2]]
    assert judge(signs, moved, timeout=60.0, apart=10.0, now=1010.0) == 3.0


def test_clocks_that_differ_condemn_nobody_alone():
    """A living rank whose clock is an hour behind; a silent one whose clock is an hour ahead."""
    assert found(sign(0), sign(1, clock=-2600.0)).ranks == [0, 1]
    ahead = [sign(0), sign(1, clock=4600.0)]
    assert found(*ahead, living=[0]) is None
    assert found(*ahead, living=[0], apart=31.0).ranks == [1]


def test_a_rank_that_never_gave_a_sign_is_named():
    signs = [sign(0), None]
    verdict = judge(signs, [*later(sign(0), living=[0]), None], timeout=60.0, apart=31.0, now=0.0)
    assert verdict.sentence.startswith("rank 1 has given no sign since the start, and rank 0 waits")


# --- the start ---------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> int:
    """This process is rank 0 of three; returns the port."""
    port = _free_port()
    names = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (names | {"RES_OPTIONS": "timeout:1 attempts:1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.mark.usefixtures("launched")
def test_ranks_that_do_not_come_are_named():
    told = "only 1 of 3 ranks came within 1 s, all of them from .*; missing: 1, 2: look at the log"
    with pytest.raises(UserError, match=told):
        _rendezvous.meet(0.6)


def test_a_port_that_is_in_use_is_named(launched: int):
    with socket.socket() as other:
        other.bind(("", launched))
        other.listen()
        with pytest.raises(UserError, match=f"port {launched} of .* is in use: .* --master_"):
            _rendezvous.meet(0.6)


def test_a_rank_0_that_does_not_come_is_named(launched: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=f"rank 1 on .* cannot reach rank 0 at .*:{launched}"):
        _rendezvous.meet(1.0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
