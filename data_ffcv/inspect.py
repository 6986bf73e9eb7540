"""Shows what a ``.beton`` file holds, and whether it is sound.

    python -m data_ffcv.inspect train.beton            # a table, and train.beton.png
    python -m data_ffcv.inspect train.beton --verify   # reads everything; exit code 1 if damaged

The picture is a contact sheet of samples that a seed chooses.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from data_ffcv.beton.contact_sheet import check_target, write_sheet
from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.info import BetonInfo, inspect_beton, side_path
from data_ffcv.beton.layout import IGNORED, JPG
from data_ffcv.beton.verify import Finding, find_gaps, read_mask, verify
from data_ffcv.errors import DataError

__all__ = ["Finding", "verify"]

_NUM_MASKS = 500  # masks that are counted
_MAX_CLASSES = 20  # more than this are shown in part
_NUM_ENDS = 5  # of which the first and the last few

Row = tuple[str, str]


def describe(info: BetonInfo) -> list[Row]:
    """Returns what there is to know about a file, (name, value) each, without decoding images."""
    samples = info.samples
    jpeg_share = float((samples.modes == JPG).mean())
    rows = [
        ("kind", "segmentation" if info.has_masks else "classification"),
        ("samples", f"{info.num_samples:,}"),
        ("classes", f"{info.num_classes:,}"),
        ("height", _spread(samples.heights)),
        ("width", _spread(samples.widths)),
        ("stored as", f"raw {1 - jpeg_share:.1%}, JPEG {jpeg_share:.1%}"),
        ("bytes", f"{info.path.stat().st_size:,}, images {int(samples.num_bytes.sum()):,}"),
    ]
    return rows + _describe_side(info.path) + _describe_classes(info)


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, median {np.median(values):.0f}"


def _describe_side(path: Path) -> list[Row]:
    """Returns what the side file adds; `inspect_beton` has read it, if there is one."""
    side = side_path(path)
    if not side.is_file():
        return [("side file", "none")]
    content = json.loads(side.read_text(encoding="utf-8"))
    names = {"format": "format", "source": "source", "part": "part", "sha256": "stored SHA-256"}
    rows = [(title, str(content[key])) for key, title in names.items() if content.get(key)]
    rows.append(("skipped", f"{content.get('num_skipped') or 0:,}"))
    notes = (content.get("notes") or {}).items()
    return rows + [(f"note: {note}", f"{count:,} images") for note, count in notes]


def _describe_classes(info: BetonInfo) -> list[Row]:
    if info.labels is not None:
        counts = np.bincount(info.labels, minlength=info.num_classes)
        return _list_classes(info.classes, counts, [f"{count:,} images" for count in counts])
    num_masks, counts = count_pixels(info)
    shares = counts / counts.sum()
    values = [f"{share:.2%}" for share in shares[: info.num_classes]]
    heading = ("pixels of", f"{num_masks:,} of {info.num_samples:,} masks")
    ignored = ("ignored", f"{shares[IGNORED]:.2%}")
    return [heading, *_list_classes(info.classes, counts[: info.num_classes], values), ignored]


def count_pixels(info: BetonInfo) -> tuple[int, np.ndarray]:
    """Returns (number of masks looked at, pixels of each mask value, int64 [256])."""
    num_masks = min(_NUM_MASKS, info.num_samples)
    chosen = np.random.default_rng(0).choice(info.num_samples, num_masks, replace=False)
    images = BetonImages(info)
    counts = np.zeros(256, np.int64)
    for index in chosen.tolist():
        counts += np.bincount(read_mask(info, images, index).ravel(), minlength=256)
    return num_masks, counts


def _list_classes(classes: tuple[str, ...], counts: np.ndarray, values: list[str]) -> list[Row]:
    """Returns a row for each class, or for the first, the last and the extreme ones of many."""
    rows = [(f"class {number} {name}", value) for number, (name, value) in
            enumerate(zip(classes, values, strict=True))]  # fmt: skip
    if len(rows) <= _MAX_CLASSES:
        return rows
    extremes = [
        (f"{title} frequent: {rows[which][0]}", values[which])
        for title, which in (("most", int(counts.argmax())), ("least", int(counts.argmin())))
    ]
    return [*rows[:_NUM_ENDS], ("...", "..."), *rows[-_NUM_ENDS:], *extremes]


def _print_table(console: Console, info: BetonInfo) -> None:
    table = Table(title=str(info.path), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in describe(info):
        table.add_row(name, value)
    console.print(table)


def _print_findings(console: Console, path: Path) -> bool:
    """Verifies with a progress bar and returns whether the file is sound."""
    columns = (TextColumn("checking {task.description}"), BarColumn(), TaskProgressColumn())
    with ProgressBar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        findings = verify(path, on_progress)
    gaps = find_gaps(path)
    verdict = "damaged" if findings else "no damage found" if gaps else "sound"
    lines = [*map(str, findings), *([gaps] if gaps else []), f"{path}: {verdict}"]
    for line in lines:
        console.print(line, soft_wrap=True)
    return not findings


def _run(args: argparse.Namespace, console: Console) -> int:
    path = Path(args.path)
    out = Path(args.out or f"{path}.png")
    if args.sheet:
        if args.num_images < 1:
            raise DataError(f"--num_images must be positive, got {args.num_images}")
        check_target(out)
    if args.verify and not _print_findings(console, path):
        return 1
    info = inspect_beton(path)
    _print_table(console, info)
    if args.sheet:
        chosen = write_sheet(info, out, args.num_images, args.seed)
        console.print(f"{out}: {len(chosen)} images", soft_wrap=True)
    return 0


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_ffcv.inspect", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="F.beton")
    parser.add_argument("--verify", action="store_true", help="read and check every byte")
    parser.add_argument("--out", metavar="PNG", help="the contact sheet; F.beton.png by default")
    parser.add_argument(
        "--no-sheet", dest="sheet", action="store_false", help="print the table only"
    )
    parser.add_argument("--num_images", type=int, default=64, help="images on the sheet")
    parser.add_argument("--seed", type=int, default=0, help="decides which images")
    return parser.parse_args()


def main() -> int:
    """Runs the command; returns its exit code, 1 for a damaged file and 2 after an error."""
    args = _parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        # Nothing in a path is markup.
        return _run(args, Console(markup=False, emoji=False, highlight=False))
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
