"""The result of `data_loading.py`: tables for people, and JSON with every number."""

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from _about import about, table
from _about import save as save_text
from _loaders import DATA_LOADER, FFCV, OURS, Contender

NAME = "data-loading-cpu"
PACKAGES = ("ffcv", "numba", "torchvision", "webdataset", "pillow", "simplejpeg", "opencv-python")

Measured = list[dict[str, Any]]


def save(args: argparse.Namespace, found: dict[str, Any], images: dict[int, Any]) -> str:
    """Write both files, and return the text of the tables."""
    head = about("data_loading.py", "cpu") | {
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "images": f"{images}, 32x32: {args.num_small}",
        "arguments": f"{args.num_workers} workers, batches of {args.batch_size}",
        "seconds of parts": str(found["seconds of parts"]),
    }
    body = []
    for part, write in WRITERS.items():
        if part in found:
            body += [f"## {part}", "", *write(found[part]), ""]
    text = save_text(args.output, NAME, "Loading of images", head, body[:-1])
    numbers = json.dumps({**head, **found}, indent=1) + "\n"
    (args.output / f"{head['date']}-{NAME}.json").write_text(numbers)
    return text


def _throughput(found: Measured) -> list[str]:
    lines = []
    for size in sorted({one["size"] for one in found}, reverse=True):
        ours = [one for one in found if one["size"] == size]
        lines += [f"### {size}x{size}", "", *_rates(ours), "", *_targets(ours), ""]
    return lines[:-1]


def _rates(found: Measured) -> list[str]:
    heads = ["contender", "images", "resize", "gives"]
    columns = sorted({one["num_streams"] for one in found})
    for count in columns:
        heads += [f"{count} stream{'s' * (count > 1)}, images/s", "range", f"/ {DATA_LOADER}"]
    rows = []
    for contender in dict.fromkeys(_contender(one) for one in found):
        row = contender.cells()
        for count in columns:
            rates = _find(found, contender, count)
            row += [*_cells(rates), _ratio(rates, _find(found, _baseline(contender), count))]
        rows.append(row)
    size = found[0]["size"]
    baseline = "bilinear" if size == 256 else "the same crop, bilinear where it is resized"
    return [*table(heads, rows), "", f"Baseline: ImageFolder or arrays + DataLoader, {baseline}."]


def _targets(found: Measured) -> list[str]:
    """What the streams should reach, where the run has both sides."""
    own = Contender(FFCV, "raw", "area", "uint8")
    folder = Contender(DATA_LOADER, "folder", "bicubic")
    bilinear = folder._replace(resize="bilinear")
    wanted = [
        (Contender(OURS, "raw", "area"), own, 1.5),
        (Contender(OURS, "raw", "bicubic"), folder, 2.5),
        (Contender(OURS, "jpg", "area"), bilinear, 1.8),
        (Contender(OURS, "jpg", "bicubic"), bilinear, 1.8),
    ]
    rows = []
    for (ours, other, ratio), gives in ((w, g) for w in wanted for g in ("float32", "uint8")):
        ours = ours._replace(gives=gives)
        for count in sorted({one["num_streams"] for one in found}):
            rates = _find(found, ours, count), _find(found, other, count)
            if all(rates):
                ratios = _ratios(*rates)
                row = [_name(ours), _name(other), str(count), f"{median(ratios):.2f}"]
                rows.append([*row, f"{min(ratios):.2f}-{max(ratios):.2f}", f">= {ratio}"])
    heads = ["ours", "other", "streams", "ratio", "range", "wanted"]
    return table(heads, rows) if rows else []


def _contender(one: dict[str, Any]) -> Contender:
    return Contender(*(one[name] for name in Contender._fields))


def _baseline(contender: Contender) -> Contender:
    images = "folder" if contender.image_size == 224 else "arrays"
    resize = "bilinear" if contender.resize else ""
    return Contender(DATA_LOADER, images, resize, "float32", contender.image_size)


def _find(found: Measured, contender: Contender, num_streams: int) -> list[float]:
    for one in found:
        if _contender(one) == contender and one["num_streams"] == num_streams:
            return one["rates"]
    return []


def _ratios(rates: Sequence[float], others: Sequence[float]) -> list[float]:
    """Within rounds."""
    return [a / b for a, b in zip(rates, others, strict=True)]


def _ratio(rates: list[float], others: Sequence[float] = ()) -> str:
    """Median of the ratios within rounds."""
    return f"{median(_ratios(rates, others)):.2f}" if others else "-"


def _name(contender: Contender) -> str:
    return ", ".join(contender.cells())


def _cells(values: Sequence[float], digits: int = 0) -> list[str]:
    """Median and range."""
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, median, max))
    return [middle, f"{low}-{high}"]


def _start(found: dict[str, list[float]]) -> list[str]:
    rows = [[name, *_cells(seconds, 1), "<= 15"] for name, seconds in found.items()]
    heads = ["contender", "seconds to the first batches of 3 streams", "range", "wanted of ours"]
    return table(heads, rows)


def _memory(found: Measured) -> list[str]:
    rows = []
    for one in found:
        first, _, third = one["streams"]
        row = [one["library"], f"{one['num_images']:,}"]
        row += [f"{first['seconds']:.2f}", f"{third['seconds']:.2f}"]
        row += [f"{first['first_batch_seconds']:.2f}", f"{third['first_batch_seconds']:.2f}"]
        further = (third["megabytes"] - first["megabytes"]) / 2
        row += [f"{first['megabytes']:.0f}", f"{further:.0f}", f"{third['megabytes']:.0f}"]
        rows.append(row)
    heads = ["contender", "images", "s to open the 1st", "3rd", "s to its first batch: 1st", "3rd"]
    return table([*heads, "MB of the 1st", "of a further one", "of all three"], rows)


def _conversion(found: Measured) -> list[str]:
    rows = []
    for one in found:
        other = [
            o["rates"]
            for o in found
            if (o["library"], o["size"], o["mode"]) == (FFCV, one["size"], one["mode"])
        ]
        row = [f"{one['library']}", f"{one['size']}x{one['size']} {one['images']}", one["mode"]]
        rows.append([*row, *_cells(one["rates"]), _ratio(one["rates"], *other)])
    heads = ["converter", "images", "written as", "images/s", "range"]
    return table([*heads, f"/ {FFCV}"], rows)


def _training(found: dict[str, dict[str, list[float]]]) -> list[str]:
    rows = []
    for ranks, seconds in found.items():
        ratios = _ratios(seconds["synthetic"], seconds["real"])
        row = [ranks, *(f"{1e3 * median(seconds[kind]):.1f}" for kind in ("synthetic", "real"))]
        rows.append([*row, *_cells(ratios, 3), ">= 0.97"])
    heads = ["", "ms per cycle, synthetic", "real", "speed, real / synthetic", "range", "wanted"]
    return table(heads, rows)


def _growth(found: Measured) -> list[str]:
    rows = [
        [one["library"], str(one["num_epochs"]), f"{one['megabytes']:.1f}", str(one["num_threads"])]
        for one in found
    ]
    return table(["contender", "epochs", "MB of the process", "threads"], rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


WRITERS = {
    "throughput": _throughput,
    "start": _start,
    "memory": _memory,
    "conversion": _conversion,
    "training": _training,
    "growth": _growth,
}
