"""The hosts of a hostfile, and the command that starts a Python on each."""

import logging
import os
import re
import shlex
import sys
from dataclasses import dataclass

from deepspeed.launcher.runner import fetch_hostfile

from mlomae.errors import UserError

CONNECT_SECONDS = 10
_BOOT = "import sys; b = sys.stdin.buffer; exec(b.read(int(b.readline())))"

# A name or an IPv4 address, maybe behind a user: nothing that ssh would take for an option.
_HOST = re.compile(r"(\w[\w.-]*@)?\w[\w.-]{0,252}", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A line of a hostfile; `slots` is None for this machine without one."""

    name: str
    slots: int | None = None


def is_host_name(name: str) -> bool:
    """Whether a text is a host's name or IPv4 address, and nothing that a program could obey."""
    return _HOST.fullmatch(name) is not None


def read_hostfile(path: str) -> list[Host]:
    """Read a hostfile with DeepSpeed's parser.

    Raises:
        UserError: it is missing or empty, or a line is not `HOST slots=NUMBER`.
    """
    slots = _parse(path)
    for name, number in slots.items():
        if not is_host_name(name):
            raise UserError(
                f"hostfile {path}: {name!r} is no host name: give a name of letters, digits, dots, "
                "hyphens and underscores, which begins with neither dot nor hyphen"
            )
        if number < 1:
            raise UserError(f"hostfile {path}: {name} has slots={number}: give at least 1")
    return [Host(name, number) for name, number in slots.items()]


def _parse(path: str) -> dict[str, int]:
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would print the whole file beside our sentence
    try:
        slots = fetch_hostfile(path)
    except (OSError, ValueError) as error:
        problem = str(error).partition(", unable to proceed")[0]
        raise UserError(
            f"hostfile {path} cannot be used ({problem}): write one line `HOST slots=NUMBER` for "
            "each host"
        ) from None
    finally:
        logger.setLevel(level)
    if slots is None:
        raise UserError(f"hostfile {path} is no file: give one of lines `HOST slots=NUMBER`")
    return dict(slots)


def ssh_command(name: str, port: int | None) -> list[str]:
    """The ssh to a host as pdsh calls it, except that it never asks for a password.

    The shell over there gets the path of this interpreter and a constant, nothing that a file says.
    """
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=15"]
    return [
        "ssh",
        *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")),
        *("-a", "-x"),
        *(part for option in options for part in ("-o", option)),
        *(() if port is None else ("-p", str(port))),
        *("--", name, shlex.join(local_command())),
    ]


def local_command() -> list[str]:
    """A Python that runs the program on its standard input, behind its length in bytes."""
    return [sys.executable, "-u", "-c", _BOOT]
