"""What reports and results have in common: names of their files, numbers and tables."""

from collections.abc import Iterable

RESULT_FILE, REPORT_FILE = "result.json", "report.md"


def format_number(name: str, value: float) -> str:
    """Accuracies and means of IoU in per cent, everything else with six digits."""
    is_share = "accuracy" in name or name.endswith(("/mIoU", "/mAcc", "/aAcc"))
    return f"{100 * value:.2f} %" if is_share else f"{value:.6g}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(map(table_row, [header, ("---",) * len(header), *rows]))


def table_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
