"""Converts image collections to ``.beton`` files.

    python -m data_ffcv.convert cifar10 data/cifar10 cifar10.beton --download
    python -m data_ffcv.convert imagefolder photos train.beton --shortest_side 256 --split 0.8
    python -m data_ffcv.convert segmentation scenes scenes.beton --longest_side 512

Beside OUT.beton stands OUT.beton.json with the class names, the counts and checksums, and
OUT.beton.report.txt if images were skipped or had to be changed.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_ffcv.beton.info import BetonInfo, inspect_beton, side_path
from data_ffcv.beton.layout import compute_checksums, read_layout
from data_ffcv.conversion.choice import choose_samples
from data_ffcv.conversion.encoding import WRITE_MODES, Encoding, WriteMode, require
from data_ffcv.conversion.staging import Staging, check_outs, explain_errors, report_path
from data_ffcv.conversion.writer import Written, write_beton
from data_ffcv.errors import DataError
from data_ffcv.sources import FORMATS, default_part, open_source

_SECONDS_PER_UPDATE = 0.1


def convert(
    format: str,
    source: str | Path,
    out: str | Path,
    *,
    part: str | None = None,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
    ignore_index: int | None = None,
    download: bool = False,
    shortest_side: int | None = None,
    longest_side: int | None = None,
    write_mode: WriteMode = "raw",
    compress_probability: float = 0.5,
    jpeg_quality: int = 90,
    num_workers: int = 1,
    seed: int = 0,
    subset: int | float | None = None,
    split: float | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BetonInfo:
    """Writes a ``.beton`` file, samples shuffled: images with labels, or images with masks.

    The file appears under its name only when it is complete and checked. Its bytes depend on the
    source, the settings and the seed, not on `num_workers`.

    Args:
        format: One of `FORMATS`.
        source: The folder or archive.
        out: The file to write; its name ends in ``.beton``.
        part: Official part of an archive: train (also if None), test, val, ...
        labels: Labels of a flat folder, as `data_ffcv.sources.open_source` explains; likewise
            `classes`, `ignore_index` and `download`.
        shortest_side: Shrink images whose shorter side is longer than this, to this.
        longest_side: Shrink images whose longer side is longer than this, to this.
        write_mode: ``raw`` pixels, ``jpg``, a share of JPEG (``proportion``), or JPEG for images
            above 128x128 (``smart``).
        compress_probability: The share in write mode ``proportion``.
        jpeg_quality: Quality of what is stored as JPEG, 1 to 100.
        num_workers: Threads that read and encode.
        seed: Decides subset, split, order and which images ``proportion`` compresses.
        subset: Take only so many images (int) or this share of them (float), of each class alike.
        split: Share of the images, of each class alike, that goes to `out`; the others go to
            `held_out_path(out)`.
        on_error: ``skip`` leaves images out that cannot be read, and lists them in a report.
        overwrite: Replace existing files.
        on_progress: Called now and then with (samples done, samples in all).

    Returns:
        What `out` holds.

    Raises:
        DataError: the output exists or cannot be written, a setting is wrong, or an image cannot
            be read (named).
    """
    encoding = Encoding(
        write_mode, jpeg_quality, compress_probability, shortest_side, longest_side, seed
    )
    _check_settings(num_workers, subset, split, on_error)
    outs = _list_outs(out, split)
    check_outs(outs, overwrite)
    samples = open_source(
        format,
        source,
        part=part,
        labels=labels,
        classes=classes,
        ignore_index=ignore_index,
        download=download,
    )
    parts = choose_samples(samples.labels, len(samples), subset, split, seed)
    with ExitStack() as stack:
        stagings = [stack.enter_context(_stage(path)) for path in outs]
        on_sample = _count(sum(map(len, parts)), on_progress)
        for number, (staging, indices) in enumerate(zip(stagings, parts, strict=True)):
            with explain_errors(staging.out):
                written = write_beton(
                    staging.file,
                    samples,
                    indices,
                    encoding,
                    num_workers=num_workers,
                    skip_errors=on_error == "skip",
                    on_sample=on_sample,
                )
                about: dict[str, object] = {
                    "format": format,
                    "source": str(source),
                    "part": part or default_part(format),
                    "classes": list(samples.classes),
                    "subset": subset,
                    "split": split,
                    "held_out": number == 1,
                }
                _describe(staging, about, encoding, written)
        infos = [inspect_beton(staging.path) for staging in stagings]
        for staging in reversed(stagings):
            try:
                with explain_errors(staging.out):
                    staging.publish(overwrite)
            except DataError as error:
                if overwrite and staging is not stagings[-1]:
                    raise DataError(f"{error}; {outs[-1]} has been replaced already") from error
                raise
    return dataclasses.replace(infos[0], path=outs[0])


def held_out_path(out: str | Path) -> Path:
    """Where the rest of a `split` goes: OUT.held_out.beton."""
    return Path(out).with_suffix(".held_out.beton")


def _check_settings(
    num_workers: int, subset: int | float | None, split: float | None, on_error: str
) -> None:
    require(num_workers >= 1, f"num_workers must be positive, got {num_workers}")
    require(
        subset is None or (0 < subset <= 1 if isinstance(subset, float) else subset >= 1),
        f"subset must be a number of images or a share in (0, 1], got {subset}",
    )
    require(split is None or 0 < split < 1, f"split must be between 0 and 1, got {split}")
    require(on_error in ("stop", "skip"), f"on_error must be stop or skip, got {on_error!r}")


def _stage(out: Path) -> Staging:
    with explain_errors(out):
        return Staging(out)


def _count(total: int, on_progress: Callable[[int, int], None]) -> Callable[[], None]:
    """Returns what is to be called after each sample; reports now and then, and at the end."""
    done, last = 0, -_SECONDS_PER_UPDATE

    def on_sample() -> None:
        nonlocal done, last
        done += 1
        now = time.perf_counter()
        if done == total or now - last >= _SECONDS_PER_UPDATE:
            last = now
            on_progress(done, total)

    return on_sample


def _describe(
    staging: Staging, about: dict[str, object], encoding: Encoding, written: Written
) -> None:
    """Writes what stands beside the file."""
    layout = read_layout(staging.path)
    sha256, checksums = compute_checksums(staging.file, layout)
    staging.write_side_file(
        {
            **about,
            "num_samples": written.num_samples,
            "image_size": written.image_size,
            **dataclasses.asdict(encoding),
            "num_skipped": len(written.skipped),
            "notes": dict(sorted(written.notes.items())),
            "page_size": layout.page_size,
            "sha256": sha256,
            "checksums": checksums,
        }
    )
    staging.write_report(
        [f"skipped\t{name}\t{reason}" for name, reason in written.skipped]
        + [f"changed\t{name}\t{notes}" for name, notes in written.changed]
    )


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_ffcv.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("out", metavar="OUT.beton")
    parser.add_argument("--part", help="of an archive: train (default), test, val, ...")
    parser.add_argument("--labels", help="file with a label for each image of a flat folder")
    parser.add_argument("--classes", help="file with the class names")
    parser.add_argument("--ignore_index", type=int, help="mask value that means no class")
    parser.add_argument("--download", action="store_true", help="fetch what is missing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shortest_side", type=int, help="shrink longer shorter sides to this")
    size.add_argument("--longest_side", type=int, help="shrink longer sides to this")
    parser.add_argument("--write_mode", choices=WRITE_MODES, default="raw")
    parser.add_argument("--compress_probability", type=float, default=0.5)
    parser.add_argument("--jpeg_quality", type=int, default=90)
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subset", type=_number, help="images, or a share such as 0.1")
    parser.add_argument(
        "--split", type=float, help="share of OUT; OUT.held_out.beton gets the rest"
    )
    parser.add_argument("--on_error", choices=("stop", "skip"), default="stop")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def main() -> int:
    """Runs the command; returns its exit code."""
    args = _parse_args()
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)  # paths stay as is
    outs = _list_outs(args.out, args.split)
    before = {out: _identify(out) for out in outs}
    start = time.perf_counter()
    try:
        with _progress_bar(console) as on_progress:
            convert(**vars(args), on_progress=on_progress)
        _print_summary(console, outs, time.perf_counter() - start)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        done = ", ".join(str(out) for out in outs if _identify(out) != before[out])
        left = f"written completely: {done}" if done else "no file was written"
        sys.stderr.write(f"error: stopped; {left}\n")
        return 130
    return 0


def _list_outs(out: str | Path, split: float | None) -> list[Path]:
    is_split = split is not None and Path(out).suffix == ".beton"  # another will be refused
    return [Path(out), held_out_path(out)] if is_split else [Path(out)]


def _identify(path: Path) -> int | None:
    """Returns what changes when another file gets this name."""
    return path.stat().st_ino if os.path.exists(path) else None


@contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = [TextColumn("converting"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TextColumn("ETA"), TimeRemainingColumn()]
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=None, rate="")

        def on_progress(done: int, total: int) -> None:
            rate = f"{done / (time.perf_counter() - start):.0f} images/s"
            progress.update(task, completed=done, total=total, rate=rate)

        yield on_progress


def _print_summary(console: Console, outs: list[Path], seconds: float) -> None:
    sides = [json.loads(side_path(out).read_text(encoding="utf-8")) for out in outs]
    rate = sum(side["num_samples"] for side in sides) / seconds
    for out, side in zip(outs, sides, strict=True):
        text = (
            f"{out}: {side['num_samples']} images, {len(side['classes'])} classes, "
            f"{rate:.0f} images/s, {out.stat().st_size} bytes"
        )
        if report_path(out).exists():
            text += f", {side['num_skipped']} skipped, see {report_path(out)}"
        console.print(text, soft_wrap=True)


if __name__ == "__main__":
    # End like an interrupt: whatever is unfinished is removed on the way out.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup ignores the latter
            signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
