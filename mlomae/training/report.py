"""What a finished run leaves besides weights: summary.json, result.json and a one-page report."""

import json
from pathlib import Path
from typing import Any

from mlomae.checkpoint.files import replace_text
from mlomae.environment import versions
from mlomae.recipe import RunRecipe
from mlomae.training.monitor import read_metrics
from mlomae.training.result import REPORT_FILE, RESULT_FILE, format_number, table
from mlomae.training.task import Task

SUMMARY_FILE = "summary.json"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write how long a run took and how fast it was; its presence says that the run is over."""
    replace_text(folder / SUMMARY_FILE, json.dumps(summary, indent=1))


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write what an evaluation measured, and how."""
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")


def write_report(
    folder: Path,
    recipe: RunRecipe,
    task: Task,
    summary: dict[str, Any],
    evaluation: dict[str, float],
) -> None:
    """Write the page that says what was run and what came of it."""
    first = task.first_level.name
    run = [
        ("method", recipe.method),
        ("images", f"{recipe.data.train} ({task.num_images} for {first})"),
        ("started from", " and ".join(map(str, recipe.init_from)) or "random weights"),
        ("epochs", f"{recipe.epochs:g} ({task.first_level.num_steps_done} steps of {first})"),
        ("batch", f"{recipe.levels[first].batch_size} over {summary['world_size']} ranks"),
        ("seed", str(recipe.seed)),
        ("training time", f"{summary['seconds']:.0f} s"),
        ("images per second", f"{summary['images_per_second']:.0f}"),
    ]
    measured = last_losses(folder) | evaluation
    numbers = [(name, format_number(name, value)) for name, value in measured.items()]
    page = [
        f"# {folder.name}: {recipe.method}",
        table(("run", ""), run + task.report()),
        table(("result", ""), numbers),
        f"Complete settings: `recipe.yaml`, `deepspeed_config.json`. Curves: `tensorboard --logdir "
        f"{folder} --host localhost`. One seed says little about small differences.",
        versions(),
    ]
    (folder / REPORT_FILE).write_text("\n\n".join(page) + "\n")


def last_losses(folder: Path) -> dict[str, float]:
    """Losses and online accuracies of a run's last row of training."""
    rows = [row for row in read_metrics(folder) if "seconds" in row]
    shown = ("/loss", "accuracy")
    last = rows[-1] if rows else {}
    return {name: value for name, value in last.items() if name.endswith(shown)}
