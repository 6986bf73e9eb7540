"""What an evaluation leaves: result.json, report.md, metrics.jsonl, TensorBoard, and a table."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlomae.checkpoint.folders import RECIPE_FILE
from mlomae.errors import UserError
from mlomae.training.result import REPORT_FILE, RESULT_FILE, format_number, table

_STEP = re.compile(r"step_(\d+)")


def refuse_run_folder(folder: Path, flag: str) -> None:
    """Refuse to write an evaluation's files among those of a training run, which they replace.

    Raises:
        UserError: the folder is a run's.
    """
    if any((folder / name).exists() for name in (RECIPE_FILE, "checkpoints")):
        raise UserError(
            f"the folder {folder} holds a training run, whose report and metrics would be "
            f"replaced: choose another with {flag}"
        )


def make_folder(folder: Path, flag: str) -> None:
    """Create the folder that a flag decides, before the work for it starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another with {flag}"
        ) from None


def write_json(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result, replacing an earlier one.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}): choose another output"
        ) from None


def write_result(folder: Path, result: dict[str, Any], protocol: str) -> None:
    """Write everything about one evaluation; its floats are what was measured.

    Args:
        folder: exists.
        result: as result.json holds it; `evaluation`, `encoder`, `command` and the source of the
            encoder among them.
        protocol: Markdown about what the numbers mean.
    """
    write_json(folder / RESULT_FILE, result)
    (folder / REPORT_FILE).write_text(render_report(result, protocol), encoding="utf-8")
    from torch.utils.tensorboard import SummaryWriter  # late, both: it takes a second to load

    from mlomae.training.monitor import METRICS_FILE

    numbers = {f"eval/{result['evaluation']}/{k}": v for k, v in measured(result).items()}
    step = checkpoint_step(result)
    (folder / METRICS_FILE).write_text(json.dumps({"step": step, **numbers}) + "\n")
    with SummaryWriter(str(folder), purge_step=0) as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result by name; what it took is not among them."""
    return {k: v for k, v in result.items() if isinstance(v, float) and k != "seconds"}


def checkpoint_step(result: Mapping[str, Any]) -> int:
    """Cycle of the checkpoint by its folder's name; 0 for an untrained encoder or no run's."""
    name = Path(result.get("checkpoint", "")).name
    match = None if result.get("untrained") else _STEP.fullmatch(name)
    return int(match[1]) if match else 0


def render_report(result: Mapping[str, Any], protocol: str) -> str:
    """One page of Markdown."""
    shown = {k: v for k, v in result.items() if _is_plain(v) and k not in _IN_SECTIONS}
    sections = [
        f"# {result['evaluation']} of {encoder_of(result)}",
        table(("measured", ""), ((k, format_number(k, v)) for k, v in measured(result).items())),
        protocol.strip(),
        table(("what", ""), ((k, _one_line(v)) for k, v in shown.items())),
        table(("setting", ""), ((k, _one_line(v)) for k, v in result["settings"].items())),
        f"```\n{result['command']}\n```",
        "\n".join(f"- {line}" for line in [*result["machine"], f"{result['seconds']:.1f} s"]),
    ]
    return "\n\n".join(sections) + "\n"


_IN_SECTIONS = ("evaluation", "command", "machine")


def encoder_of(result: Mapping[str, Any]) -> str:
    """What was evaluated, in words."""
    source = result.get("checkpoint") or " and ".join(result["init_from"])
    return f"{result['encoder']} ({source})"


def show(result: Mapping[str, Any], folder: Path) -> None:
    """Print the numbers, and where the result is."""
    shown = Table(f"{result['evaluation']} of {encoder_of(result)}", "")
    shown.columns[0].overflow = "fold"
    for name, value in measured(result).items():
        shown.add_row(name, format_number(name, value))
    shown.add_row("seconds", f"{result['seconds']:.1f}")
    console = Console()
    console.print(shown)
    console.print(f"result: {folder / RESULT_FILE}", highlight=False, soft_wrap=True)


def _is_plain(value: Any) -> bool:
    """Whether a value fits in a row, other than a number that was measured."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, str | int) for one in values)


def _one_line(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
