"""Converts image collections to ``.beton`` files.

    python -m data_ffcv.convert fashion-mnist /usr/share/datasets/fashion-mnist train.beton
    python -m data_ffcv.convert imagefolder photos train.beton --write_mode jpg --min_side 256

Beside OUT.beton stands OUT.beton.json with the class names, the counts and a checksum.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_ffcv import _sources
from data_ffcv.beton import BetonInfo, inspect_beton, side_path
from data_ffcv.errors import DataError

FORMATS = ("imagefolder", "cifar10", "cifar100", "fashion-mnist")
WRITE_MODES = ("raw", "jpg", "proportion", "smart")
_SMART_BYTES = 128 * 128 * 3  # write mode "smart": larger images are stored as JPEG


def convert(
    format: str,
    source: str | Path,
    out: str | Path,
    *,
    split: Literal["train", "test"] = "train",
    min_side: int | None = None,
    write_mode: Literal["raw", "jpg", "proportion", "smart"] = "raw",
    jpeg_quality: int = 90,
    num_workers: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BetonInfo:
    """Writes one ``.beton`` file with fields image (RGB) and label, samples shuffled.

    The file appears under its name only when it is complete and checked.

    Args:
        format: One of `FORMATS`.
        source: A folder of class folders, or the folder of the extracted archive.
        out: The file to write.
        split: Which part of an archive; an ImageFolder is taken whole.
        min_side: Shrink images whose shorter side is longer than this, to this.
        write_mode: ``raw`` pixels, ``jpg``, half of each (``proportion``), or JPEG for images
            above 128x128 (``smart``).
        jpeg_quality: Quality of what is stored as JPEG, 1 to 100.
        num_workers: Writing processes.
        seed: Decides the order of the samples.
        overwrite: Replace an existing file.
        on_progress: Called with (samples written, samples in all).

    Raises:
        DataError: the output exists, a setting is wrong, or an image cannot be read (named).
    """
    out = Path(out)
    _check_settings(out, write_mode, jpeg_quality, min_side, num_workers, overwrite)
    samples = _open_source(format, Path(source), split)
    total = len(samples.labels)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")

    from data_ffcv._writer import write_beton

    try:
        write_beton(
            samples,
            temporary,
            image_field={
                "write_mode": write_mode,
                "jpeg_quality": jpeg_quality,
                "smart_threshold": _SMART_BYTES,
            },
            min_side=min_side,
            num_workers=min(num_workers, total),
            seed=seed,
            on_progress=lambda done: on_progress(done, total),
        )
        info = inspect_beton(temporary)
        checksum = _sync_and_hash(temporary)
        # The old side file would contradict the new data between the two renames.
        side_path(out).unlink(missing_ok=True)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    _write_side_file(
        out,
        {
            "format": format,
            "source": str(source),
            "split": split if format != "imagefolder" else None,
            "classes": list(samples.classes),
            "num_samples": total,
            "image_size": {
                "height": [info.min_height, info.max_height],
                "width": [info.min_width, info.max_width],
            },
            "write_mode": write_mode,
            "seed": seed,
            "sha256": checksum,
        },
    )
    return inspect_beton(out)


def _check_settings(
    out: Path,
    write_mode: str,
    jpeg_quality: int,
    min_side: int | None,
    num_workers: int,
    overwrite: bool,
) -> None:
    if write_mode not in WRITE_MODES:
        raise DataError(f"write_mode must be one of {WRITE_MODES}, got {write_mode!r}")
    if not 1 <= jpeg_quality <= 100:
        raise DataError(f"jpeg_quality must be in [1, 100], got {jpeg_quality}")
    if num_workers < 1 or (min_side is not None and min_side < 1):
        raise DataError(f"num_workers ({num_workers}) and min_side ({min_side}) must be positive")
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; pass --overwrite or another name")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise DataError(f"{out.parent} is not a folder one can write to; create it")


def _open_source(format: str, source: Path, split: str) -> _sources.Source:
    if split not in ("train", "test"):
        raise DataError(f"split must be train or test, got {split!r}")
    if format == "imagefolder":
        return _sources.open_image_folder(source)
    if format == "fashion-mnist":
        return _sources.open_fashion_mnist(source, split)
    if format in ("cifar10", "cifar100"):
        return _sources.open_cifar(source, split, num_classes=int(format.removeprefix("cifar")))
    raise DataError(f"format must be one of {FORMATS}, got {format!r}")


def _sync_and_hash(path: Path) -> str:
    """Forces the file to disk and returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_side_file(out: Path, content: dict) -> None:
    temporary = side_path(out).with_name(f".{out.name}.{os.getpid()}.json.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, side_path(out))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_ffcv.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("out", metavar="OUT.beton")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--min_side", type=int, help="shrink longer shorter sides to this")
    parser.add_argument("--write_mode", choices=WRITE_MODES, default="raw")
    parser.add_argument("--jpeg_quality", type=int, default=90)
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Runs the command; returns its exit code."""
    args = _parse_args()
    console = Console(stderr=True)
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("converting", total=None)
            info = convert(
                **vars(args),
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
            progress.update(task, completed=info.num_samples, total=info.num_samples)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    seconds = time.perf_counter() - start
    console.print(
        f"{info.path}: {info.num_samples} images, {info.num_classes} classes, "
        f"{info.num_samples / seconds:.0f} images/s",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
