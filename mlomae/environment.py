"""What a run was made with: hardware, versions, commit."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import deepspeed
import timm
import torch

import mlomae

_PACKAGES = ("mlomae", "torch", "deepspeed", "ffcv", "timm", "numpy")


def describe_machine(root: Path) -> list[str]:
    """Hardware, versions and, in a git clone, the commit."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = ", ".join(gpus) or f"{len(os.sched_getaffinity(0))} CPU cores, no GPU"
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # run from the clone without having been installed
    lines = [f"{hardware}; {platform.platform()}", ", ".join(versions)]
    commit = _git_commit(root)
    return [*lines, f"commit {commit}"] if commit else lines


def _git_commit(root: Path) -> str | None:
    """The commit, marked where the files differ from it; None without git or a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@cache
def _commit() -> str | None:
    """The commit of the code, where it runs from a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    root = Path(mlomae.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> str:
    """The line on software that a report ends with."""
    packages = {"mlomae": mlomae, "torch": torch, "deepspeed": deepspeed, "timm": timm}
    told = [f"{name} {package.__version__}" for name, package in packages.items()]
    return f"{', '.join(told)}, Python {platform.python_version()}."
