"""A process of its own for a contender, so that what one leaves behind cannot slow the next."""

import traceback
from collections.abc import Callable
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_SECONDS_TO_END = 20.0


class Worker:
    """Calls functions in a fresh process, one at a time, while this one waits.

    The functions must belong to a module. The process can have processes of its own, and is ended
    if it does not end by itself: FFCV's threading layer sometimes does not.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            self._process.join(_SECONDS_TO_END)
            if self._process.exitcode is not None:
                return

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns what the function does.

        Raises:
            RuntimeError: it failed; the message is its traceback.
        """
        self._pipe.send((function, args))
        try:
            result, failure = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {function.__name__}{args} has ended") from None
        if failure:
            raise RuntimeError(failure)
        return result


def _serve(pipe: Connection) -> None:
    set_start_method("fork", force=True)  # as in a process that was started by hand
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = function(*args), ""
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)
