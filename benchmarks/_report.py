"""The result of a run: tables for people, and JSON with every number."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from _about import about, table
from _about import save as save_text
from _betty_side import REQUIREMENT

BASELINE = "betty"


def save(folder: Path, measured: dict[str, Any], device: str) -> str:
    """Write both files, and return the text of the tables."""
    head = about("hypergradient.py", device) | {"betty": REQUIREMENT}
    body = []
    for size, found in measured.items():
        body += [f"## {size}", "", *_passes(found), "", *_costs(found), "", *_accuracy(found), ""]
    name = f"hypergradient-{device}"
    numbers = json.dumps({**head, "sizes": measured}, indent=1) + "\n"
    text = save_text(folder, name, "One update of the masking network", head, body[:-1])
    (folder / f"{head['date']}-{name}.json").write_text(numbers)
    return text


def _passes(found: dict[str, Any]) -> list[str]:
    seconds = {name: median(times) for name, times in found["passes"].items()}
    rows = [
        [name, f"{s:.3f}", f"{s / seconds['F']:.2f}", f"{s / seconds['E']:.2f}"]
        for name, s in seconds.items()
    ]
    size = ", ".join(f"{key} {value}" for key, value in found["size"].items())
    return [f"{size}.", "", *table(["pass", "s", "/ F", "/ E"], rows)]


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
    return [f"Bound 2 F + 6 E: {bound:.2f} s.", "", *table(heads, rows)]


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
    return table(heads, rows)
