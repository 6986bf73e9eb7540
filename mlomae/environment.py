"""What a run was made with: hardware, versions, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mlomae

CLONE = Path(mlomae.__file__).resolve().parents[1]
"""The folder of the code; a git repository, unless the package was installed without one."""
_PACKAGES = ("mlomae", "torch", "deepspeed", "ffcv", "timm", "numpy")


def describe_machine(root: Path = CLONE) -> list[str]:
    """Hardware, versions and, in a git repository, the commit."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = ", ".join(gpus) or f"{len(os.sched_getaffinity(0))} CPU cores, no GPU"
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # run from the clone without having been installed
    lines = [f"{hardware}; {platform.platform()}", ", ".join(versions)]
    commit = git_commit(root, in_full=True)
    return [*lines, f"commit {commit}"] if commit else lines


@cache
def git_commit(root: Path = CLONE, *, in_full: bool = False) -> str | None:
    """The commit of a repository, marked where files differ from it.

    Args:
        root: the repository.
        in_full: all 40 digits, else as many as git takes for unique.

    Returns:
        None without git, or where the folder is no repository.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    command += ["--abbrev=40"] if in_full else []
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> str:
    """The line on software that a report ends with."""
    ours = [f"mlomae {mlomae.__version__}", f"torch {torch.__version__}"]
    others = [f"{package} {version(package)}" for package in ("deepspeed", "timm")]
    return f"{', '.join(ours + others)}, Python {platform.python_version()}."
