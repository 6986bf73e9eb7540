"""The head of a result file: what ran, where, and how busy the machine was; and its tables."""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def about(script: str, device: str) -> dict[str, str]:
    """What has to be known to repeat a run of `benchmarks/<script>`."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python benchmarks/{script}", *sys.argv[1:]]),
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "machine": _cuda() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "other load": f"{os.getloadavg()[1]:.1f} processes on average in the five minutes before",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {version('timm')}, deepspeed {version('deepspeed')}",
    }


def save(folder: Path, name: str, title: str, head: dict[str, str], body: Sequence[str]) -> str:
    """Write `<folder>/<date>-<name>.md`, and return its text."""
    lines = [f"# {title}, {head['date']}", "", *(f"- {k}: {v}" for k, v in head.items()), ""]
    text = "\n".join([*lines, *body]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{head['date']}-{name}.md").write_text(text)
    return text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows]]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{len(names)} cores of {names[0]}, {pages / 1e9:.0f} GB of memory"


def _cuda() -> str:
    query = "--query-gpu=name,memory.total,driver_version"
    return _output("nvidia-smi", query, "--format=csv,noheader")


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    return "; ".join(done.stdout.splitlines())
