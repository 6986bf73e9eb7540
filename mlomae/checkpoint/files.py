"""Small files that are whole at any moment, whatever kills the process or the machine."""

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a text file beside its name, and give it the name once it is on the disk."""
    partial = file.with_name(f"{file.name}.tmp")
    partial.write_text(text)
    sync(partial)
    partial.replace(file)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
