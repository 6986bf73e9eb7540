"""Hangs, reported with the rank that hangs.

Code that makes progress says so with `mark`. When no rank of the launch has marked anything for
`timeout` seconds, one rank says in a sentence which ranks hang and where, those and rank 0 print
their stacks, and all end with exit code 75 (EX_TEMPFAIL): launch again with `--resume`.

The ranks exchange signs through a connection of their own to the store of the process group, a few
bytes every five seconds. Two threads in each rank take part: one talks to the store, and may block
for ever where the store's host is gone; the other notices that.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mlomae.distributed.signs import Sign, Verdict, judge, places

EX_TEMPFAIL = 75  # of sysexits.h: schedulers may try again
_LONGEST_INTERVAL = 5.0  # seconds between two signs of a rank
_INTERVALS_PER_TIMEOUT = 8
_VERDICT = "verdict"

_active: "_Watchdog | None" = None


def mark(place: str) -> None:
    """Say that this rank has come to a place; costs nothing where no watchdog runs.

    Args:
        place: what is done from here on, such as `pretrain step 120`.
    """
    watchdog = _active
    if watchdog is not None:
        watchdog.place = place
        watchdog.num_marks += 1


@contextmanager
def watching(timeout: float | None) -> Iterator[None]:
    """Watch for hangs inside the context. All ranks must enter it, in a joined process group.

    Args:
        timeout: seconds without a mark on any rank that are a hang; None: never.
    """
    global _active
    if timeout is None:
        yield
        return
    watchdog = _active = _Watchdog(timeout)
    watchdog.start()
    try:
        yield
    finally:
        _active = None
        watchdog.stop()


class _Watchdog:
    """The two threads of a rank, and what it has marked.

    Attributes:
        place, num_marks: of the latest `mark`.
    """

    def __init__(self, timeout: float) -> None:
        self.place, self.num_marks = "the start", 0
        self._timeout = timeout
        self._interval = min(_LONGEST_INTERVAL, timeout / _INTERVALS_PER_TIMEOUT)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._host = socket.gethostname()
        self._store = _connect()
        self._beats = 0  # exchanges with the store so far
        self._in_place = _Stillness()
        self._unanswered = _Stillness()
        self._first_look: tuple[int, float, list[Sign | None]] | None = None
        self._look_again = 0.0  # at this many seconds in one place
        self._has_left, self._ends = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog {name}", daemon=True)
            for target, name in ((self._exchange, "exchange"), (self._watch, "watch"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this rank has ended, if the store still answers."""
        self._has_left.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _watch(self) -> None:
        """Count seconds, and end this rank when the store's host has hung."""
        before = time.monotonic()
        while not self._has_left.wait(self._interval):
            before, elapsed = (now := time.monotonic()), now - before
            # A process that was itself suspended, with all others, has not hung meanwhile.
            elapsed = min(elapsed, 2 * self._interval)
            self._in_place.pass_by(elapsed, self.num_marks)
            self._unanswered.pass_by(elapsed, self._beats)
            silence = self._unanswered.seconds
            if self._in_place.seconds >= self._timeout and silence >= self._timeout / 2:
                self._end(self._store_is_silent(silence), speaks=_is_first_of_its_kind())

    def _exchange(self) -> None:
        """Give signs, and hear or reach a verdict."""
        while not self._has_left.is_set():
            try:
                self._exchange_signs()
            except RuntimeError:  # the connection is lost, or the store's host is gone, which
                if self._has_left.wait(self._interval):  # `_watch` says when the time is over
                    return
                with suppress(RuntimeError):
                    self._store = _connect()

    def _exchange_signs(self) -> None:
        while not self._has_left.wait(self._interval if self._beats else 0):
            self._post(has_ended=False)
            if self._store.check([_VERDICT]):
                self._heed_verdict()
            if self._in_place.seconds < self._timeout:
                self._first_look, self._look_again = None, self._timeout
            elif self._in_place.seconds >= self._look_again:
                self._look(self._read())
            self._beats += 1
        self._post(has_ended=True)

    def _post(self, has_ended: bool) -> None:
        sign = Sign(
            rank=self._rank,
            host=self._host,
            beat=self._beats,
            num_marks=self.num_marks,
            place=self.place,
            waits_in=_waits_in(),
            seconds=self._in_place.seconds,
            clock=time.time(),
            has_ended=has_ended,
        )
        self._store.set(str(self._rank), json.dumps(asdict(sign)))

    def _read(self) -> list[Sign | None]:
        """The latest sign of each rank, None of one that has never given any."""
        keys = [str(rank) for rank in range(self._world_size)]
        if self._store.check(keys):
            texts = self._store.multi_get(keys)
            return [Sign(**json.loads(text)) for text in texts]
        posted = (self._store.get(key) if self._store.check([key]) else None for key in keys)
        return [None if text is None else Sign(**json.loads(text)) for text in posted]

    def _look(self, signs: list[Sign | None]) -> None:
        """Judge by two looks at least three signs apart: in between, whoever lives gives one."""
        if self._first_look is None:
            self._first_look = self._beats, time.monotonic(), signs
            return
        beat, instant, before = self._first_look
        if self._beats - beat < 3:
            return
        apart = time.monotonic() - instant
        judgement = judge(before, signs, timeout=self._timeout, apart=apart, now=time.time())
        if isinstance(judgement, Verdict):
            mine = replace(judgement, speaker=self._rank)
            self._store.compare_set(_VERDICT, "", json.dumps(asdict(mine)))  # the first one counts
            self._heed_verdict()
        elif judgement is not None:  # somebody makes progress: wait until that may have ended
            self._first_look = None
            self._look_again = self._in_place.seconds + self._timeout - judgement

    def _heed_verdict(self) -> None:
        verdict = Verdict(**json.loads(self._store.get(_VERDICT)))
        self._end(verdict, speaks=verdict.speaker == self._rank)

    def _store_is_silent(self, seconds: float) -> Verdict:
        host, port = _address()
        who = "the store of torchrun" if _is_agents() else "rank 0"
        here = places([self._rank], self.place, _waits_in())
        sentence = (
            f"{who} on {host} (port {port}) has given no sign for {seconds:.0f} s, and {here} on "
            f"{self._host}"
        )
        return Verdict([0], sentence)

    def _end(self, verdict: Verdict, speaks: bool) -> None:
        """Say one's piece, give the others the time for theirs, and end the process."""
        if not self._ends.acquire(blocking=False):
            return  # the other thread is at it
        if speaks:
            _write(
                f"error: hang: {verdict.sentence}; launch again with --resume, or raise "
                f"monitor.hang_timeout ({self._timeout:g} s) if this may take so long\n"
            )
        # Where signs cannot tell the ranks apart, as on GPUs inside of a step, their stacks may.
        if speaks or self._rank in (0, *verdict.ranks):
            _write(f"rank {self._rank} on {self._host} stands here:\n")
            faulthandler.dump_traceback(2)
        time.sleep(2 * self._interval + 1)
        os._exit(EX_TEMPFAIL)


class _Stillness:
    """For how many seconds a number has not changed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._value = -1

    def pass_by(self, seconds: float, value: int) -> None:
        self.seconds = self.seconds + seconds if value == self._value else 0.0
        self._value = value


def _connect() -> Store:
    """A connection for the watchdog alone: what blocks in it blocks nobody else."""
    host, port = _address()
    client = TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # their store outlives the ranks
    return PrefixStore(f"watchdog/{attempt}", client)


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _is_agents() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_first_of_its_kind() -> bool:
    """Whether to speak where no two ranks can agree who does: once on each host."""
    return os.environ.get("RANK") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


def _waits_in() -> str:
    """The collective call, or the waiting for one, that the main thread is in; empty in none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return ""
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    is_call = "/torch/distributed/" in file or "/deepspeed/comm/" in file
    is_wait = function in ("wait", "synchronize") and ("/torch/" in file or "/deepspeed/" in file)
    return function if is_call or is_wait else ""


def _write(text: str) -> None:
    os.write(2, text.encode())  # past the locks and buffers of whatever the main thread is in
