"""How numba compiles the pixel work: with which options, and what it keeps on disk."""

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., object])
# Any, because numba's stubs do not know the options that leave a wrapper out.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_INNER_OPTIONS: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True}


def compile_inner(function: _Function) -> _Function:
    """Compiles a function that only compiled code calls."""
    compiled: _Function = njit(**_INNER_OPTIONS)(function)
    return compiled


def compile_cached(make: Callable[[int], _Function], *paths: str) -> _Function:
    """Compiles an entry point, with all it calls, and keeps the code on disk.

    Args:
        make: Returns the function, which uses make's argument: numba's cache notices a change of
            the file that the function is in, and of the variables around it, but of no other file.
        paths: All files that shape the compiled code; this one does in any case.
    """
    contents = [Path(path).read_bytes() for path in (__file__, *paths)]
    function = make(zlib.crc32(b"".join(contents)))
    try:
        compiled: _Function = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder can be written.
        logger.warning("set NUMBA_CACHE_DIR to a writable folder to start streams faster")
        compiled = njit(**_OPTIONS)(function)
    return compiled
