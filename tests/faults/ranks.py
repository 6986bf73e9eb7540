"""Ranks of one launch, and what DeepSpeed's launcher does to them."""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults import befall
from tests.ranks import ENVIRONMENT, free_port

TIMEOUT = 90.0  # seconds for a launch; a busy machine takes its time
POLL = 1.0  # seconds until DeepSpeed's launcher notices that a rank has failed
GRACE = 1.0  # seconds between SIGTERM and SIGKILL to the ranks that are left; DeepSpeed's are 30

Fault = tuple[str, dict[str, Any]]


class Launch:
    """The ranks of one launch; made by `launched`.

    Attributes:
        logs: file with stdout and stderr of each rank.
    """

    def __init__(self, processes: Sequence[BaseProcess], logs: Sequence[Path]) -> None:
        self.processes = processes
        self.logs = logs

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each rank, -n where signal n killed it, None while it runs."""
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """What all ranks have said so far."""
        texts = (log.read_text(errors="replace") for log in self.logs)
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))

    def error(self, rank: int) -> str:
        """The sentence that a rank ended with."""
        lines = self.logs[rank].read_text().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in "\n".join(lines), self.output
        return errors[0]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank, unless it has ended."""
        process = self.processes[rank]
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def finish(self) -> list[int]:
        """Wait for all ranks, end those that outlive a failed one, and give all exit codes."""
        deadline = time.monotonic() + TIMEOUT
        while None in self.codes and not any(self.codes):
            self._wait(deadline - time.monotonic())
            if time.monotonic() > deadline:
                self._time_out()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.settle(POLL if number == signal.SIGTERM else GRACE)
            self._send_to_living(number)
        self.settle(TIMEOUT)
        return [process.exitcode for process in self.processes]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or all ranks have ended."""
        deadline = time.monotonic() + TIMEOUT
        while None in self.codes and not condition():
            if time.monotonic() > deadline:
                self._time_out()
            time.sleep(0.005)

    def settle(self, seconds: float) -> None:
        """Wait until all ranks have ended, but no longer than this."""
        deadline = time.monotonic() + seconds
        while None in self.codes and time.monotonic() < deadline:
            self._wait(deadline - time.monotonic())

    def _time_out(self) -> None:
        self._send_to_living(signal.SIGUSR1)  # the ranks print their stacks
        self.settle(1)
        raise AssertionError(f"timed out with {self.codes}\n{self.output}")

    def _wait(self, seconds: float) -> None:
        if running := [p.sentinel for p in self.processes if p.exitcode is None]:
            wait(running, max(0.0, seconds))

    def _send_to_living(self, number: signal.Signals) -> None:
        for rank in range(len(self.processes)):
            self.send(rank, number)


@contextmanager
def launched(
    context: Any,
    folder: Path,
    arguments: Sequence[str],
    faults: Mapping[int, Sequence[Fault]] | None = None,
    num_ranks: int = 2,
) -> Iterator[Launch]:
    """Ranks of `launch/pretrain.py ARGUMENTS`, none of which outlives the context.

    Args:
        context: `tests.ranks.warm_context`.
        folder: for the logs.
        faults: by rank, what befalls it: functions of `tests.faults.befall` and their arguments.
    """
    port = free_port()
    number = len(list(folder.glob("log*_0.txt")))
    logs = [folder / f"log{number}_{rank}.txt" for rank in range(num_ranks)]
    processes = []
    for rank, log in enumerate(logs):
        log.touch()
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
        environment |= {key: str(num_ranks) for key in ("WORLD_SIZE", "LOCAL_SIZE")}
        values = (environment | ENVIRONMENT, list(arguments), log, (faults or {}).get(rank, ()))
        processes.append(context.Process(target=_rank, args=values))
    try:
        for process in processes:
            process.start()
        yield Launch(processes, logs)
    finally:
        for process in filter(lambda process: process.pid, processes):
            process.kill()
            process.join(10)


def _rank(
    environment: dict[str, str], arguments: list[str], log: Path, faults: Sequence[Fault]
) -> None:
    """What `launch/pretrain.py` does."""
    with log.open("ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(environment)
    from mlomae.pretraining.program import PretrainingProgram
    from mlomae.training.command_line import run_program

    with ExitStack() as stack:
        stack.enter_context(mock.patch("mlomae.distributed.start.LAUNCHER_GRACE", POLL / 2))
        for name, values in faults:
            stack.enter_context(getattr(befall, name)(**values))
        code = run_program(PretrainingProgram(), "", arguments)
    sys.exit(code)
