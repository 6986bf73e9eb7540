"""The result of a run: tables for people, and JSON with every number."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _betty_side import REQUIREMENT

BASELINE = "betty"


def save(folder: Path, measured: dict[str, Any], device: str) -> str:
    """Write both files, and return the text of the tables."""
    about = _about(device)
    lines = [f"# One update of the masking network, {about['date']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for size, found in measured.items():
        lines += ["", f"## {size}", "", *_passes(found), "", *_costs(found), "", *_accuracy(found)]
    text = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{about['date']}-hypergradient-{device}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({**about, "sizes": measured}, indent=1) + "\n")
    return text


def _about(device: str) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/hypergradient.py", *sys.argv[1:]]),
        "commit": _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "machine": _cuda() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {version('timm')}, {REQUIREMENT}",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{len(names)} cores of {names[0]}, {pages / 1e9:.0f} GB of memory"


def _cuda() -> str:
    return _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv")


def _output(*command: str) -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    return "; ".join(done.stdout.splitlines())


def _passes(found: dict[str, Any]) -> list[str]:
    seconds = {name: median(times) for name, times in found["passes"].items()}
    rows = [
        [name, f"{s:.3f}", f"{s / seconds['F']:.2f}", f"{s / seconds['E']:.2f}"]
        for name, s in seconds.items()
    ]
    size = ", ".join(f"{key} {value}" for key, value in found["size"].items())
    return [f"{size}.", "", *_table(["pass", "s", "/ F", "/ E"], rows)]


def _costs(found: dict[str, Any]) -> list[str]:
    passes = {name: median(times) for name, times in found["passes"].items()}
    bound = 2 * passes["F"] + 6 * passes["E"]
    costs = {name: _cost(result) for name, result in found["contenders"].items()}
    rows = []
    for name, cost in costs.items():
        row = [name, f"{cost['update']:.2f}", f"{cost['update'] / bound:.2f}"]
        row += [_ratio(costs, name, "update")]
        row += [f"{cost['cycle'] - passes['plain lower steps']:.2f}"]
        for key in ("peak", "increase"):
            row += [f"{cost[key]:.0f}", _ratio(costs, name, key)]
        rows.append([*row, f"{cost['cycle_peak']:.0f}"])
    heads = ["contender", "update s", "/ bound", "/ Betty", "cycle - plain steps s"]
    heads += ["peak MB", "/ Betty", "increase MB", "/ Betty", "peak of cycle MB"]
    return [f"Bound 2 F + 6 E: {bound:.2f} s.", "", *_table(heads, rows)]


def _cost(result: dict[str, Any]) -> dict[str, float]:
    memory = result["memory"]
    return {
        "update": median(result["update"]),
        "cycle": median(map(sum, zip(result["lower"], result["update"], strict=True))),
        "peak": memory["update"],
        "increase": memory["update"] - memory["before"],
        "cycle_peak": max(memory["lower"], memory["update"]),
    }


def _ratio(costs: dict[str, dict[str, float]], name: str, key: str) -> str:
    return f"{costs[name][key] / costs[BASELINE][key]:.2f}" if BASELINE in costs else "-"


def _accuracy(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, result in found["contenders"].items():
        accuracy = result["accuracy"]
        row = [name, f"{accuracy['cosine']:.7f}", f"{accuracy['relative_error']:.1e}"]
        rows.append([*row, f"{accuracy['cosine_to_identity']:.7f}"])
    heads = ["contender", "cosine to truth", "relative error", "cosine to exact identity"]
    return _table(heads, rows)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows]]
