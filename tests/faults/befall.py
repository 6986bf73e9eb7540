"""What befalls a rank from inside, at a named place: it dies, hangs, miscounts, loses its files.

Each function gives a context in which the place is altered. The place is a dotted name as
`mock.patch` has it; `call` counts its calls from 1, of those alone that hold `path` in one of their
arguments.
"""

import os
import pkgutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

Call = Callable[[], Any]


def kill(place: str, call: int, path: str = "") -> Any:
    """SIGKILL instead of a call."""
    return _at(place, lambda original, *_: os.kill(os.getpid(), signal.SIGKILL), call, path)


def kill_after(place: str, call: int, path: str = "") -> Any:
    """SIGKILL when a call is done."""

    def act(original: Call, *_: Any) -> None:
        original()
        os.kill(os.getpid(), signal.SIGKILL)

    return _at(place, act, call, path)


def kill_in_file(place: str, call: int, path: str = "") -> Any:
    """SIGKILL when half of a file is written, whose path is an argument of the place."""

    def act(original: Call, *args: Any) -> None:
        original()
        file = next(value for value in args if isinstance(value, Path))
        os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return _at(place, act, call, path)


def hang(place: str, call: int) -> Any:
    """The call never comes back."""
    return _at(place, lambda original, *_: time.sleep(10**6), call)


def delay(place: str, seconds: float) -> Any:
    """Every call comes so much later."""

    def act(original: Call, *_: Any) -> Any:
        time.sleep(seconds)
        return original()

    return _at(place, act, call=1, num_calls=10**6)


def wait_for(place: str, call: int, file: str) -> Any:
    """The call waits until there is a file."""

    def act(original: Call, *_: Any) -> Any:
        while not os.path.exists(file):
            time.sleep(0.01)
        return original()

    return _at(place, act, call)


def spoil(place: str, call: int) -> Any:
    """The tensor that this call and every later one gives is NaN."""
    return _at(place, lambda original, *_: original() * float("nan"), call, num_calls=10**6)


def truncate(place: str, call: int, file: str) -> Any:
    """A file loses its second half before a call, when nobody is in the middle of a read."""

    def act(original: Call, *_: Any) -> Any:
        time.sleep(0.5)  # loaders have read ahead as far as they do, and the other ranks wait
        os.truncate(file, os.path.getsize(file) // 2)
        return original()

    return _at(place, act, call)


def fill(place: str, call: int, file: str, path: str = "") -> Any:
    """A file takes all that is left of its disk before a call."""

    def act(original: Call, *_: Any) -> Any:
        with open(file, "wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(2**12)):
                pass
        return original()

    return _at(place, act, call, path)


def _at(
    place: str, act: Callable[..., Any], call: int, path: str = "", num_calls: int = 1
) -> AbstractContextManager[Any]:
    original, count = pkgutil.resolve_name(place), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if path and not any(path in str(value) for value in (*args, *kwargs.values())):
            return original(*args, **kwargs)
        count += 1
        if not call <= count < call + num_calls:
            return original(*args, **kwargs)
        return act(lambda: original(*args, **kwargs), *args)

    return mock.patch(place, wrapper)
