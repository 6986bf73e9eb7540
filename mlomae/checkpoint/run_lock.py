"""One launch at a time in a run's folder."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from mlomae.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, TextIO] = {}


def lock(folder: Path) -> None:
    """Claim a run's folder until `release_all`, or until this process is gone.

    The kernel keeps the lock, so a killed launch leaves none behind. POSIX locks reach other nodes
    through NFS and Lustre, unless these are mounted with locks of each node's own (`local_lock`,
    `localflock`). A second claim by the same process does nothing.

    Raises:
        UserError: another launch has it; says which.
        OSError: the folder cannot be written.
    """
    if (key := folder.resolve()) in _held:
        return
    file = (folder / LOCK_FILE).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip()
        file.close()
        if error.errno in _UNSUPPORTED:
            logger.warning("%s: no locks here, so do not launch twice into it", folder)
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UserError(
            f"output_dir {folder} is in use by another launch ({holder or 'just started'}): wait "
            "for its end or stop it, or choose another output_dir"
        ) from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%c')}\n")
    file.flush()
    _held[key] = file


def release_all() -> None:
    """Give back every folder that this process has claimed."""
    while _held:
        _held.popitem()[1].close()
