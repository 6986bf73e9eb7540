"""Loading of images: speed, start, memory, conversion, and what it costs the training.

Our streams on both backends, FFCV's own pipelines, ImageFolder + DataLoader and WebDataset read the
same images on one machine. Contenders run in processes of their own and take turns in every round,
one at a time; tables have medians over rounds, with the smallest and the largest, and ratios are
taken within rounds. See README.md for what each part measures.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from _about import HERE
from _converting import CONVERTERS
from _data_report import save
from _footprint import grow, open_one_by_one
from _loaders import (
    CONTENDERS,
    DATA_LOADER,
    FFCV,
    LIBRARIES,
    OURS,
    OURS_THREADS,
    WEBDATASET,
    Contender,
)
from _pictures import Files, describe, make_large, make_mock, make_small
from _streaming import Load, images_per_second
from _worker import Worker

from data_ffcv import inspect_beton

NUM_STREAMS = (1, 3)
_SLOW_ROUNDS = {"start": 2, "conversion": 3, "three streams": 3}  # at most
_PACKAGES = {FFCV: "ffcv", OURS: "ffcv", WEBDATASET: "webdataset", DATA_LOADER: "torchvision"}


class Bench(NamedTuple):
    """What all parts share.

    Attributes:
        args: of the command line.
        files: forms of the images, by size.
        folder: for files that live as long as the run.
    """

    args: argparse.Namespace
    files: dict[int, Files]
    folder: Path

    def load(self, num_streams: int) -> Load:
        return Load(num_streams, self.args.num_workers, self.args.batch_size)


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, _make_files(args, Path(folder)), Path(folder))
        found: dict[str, Any] = {"seconds of parts": {}}
        for part in args.parts:
            start = time.perf_counter()
            _say(part)
            found[part] = PARTS[part](bench)
            found["seconds of parts"][part] = round(time.perf_counter() - start)
        images = {size: describe(files) for size, files in bench.files.items() if size == 256}
        print(save(args, found, images))


def _make_files(args: argparse.Namespace, folder: Path) -> dict[int, Files]:
    """Files of the sizes asked for; parts that need the small ones get them in any case."""
    _say("pictures")
    files = {32: make_small(args.num_small, folder, args.num_workers)}
    if set(args.parts) - {"training", "growth"} and 256 in args.sizes:
        files[256] = make_large(args.images, args.num_images, folder, args.num_workers)
    return files


def measure_throughput(bench: Bench) -> list[dict[str, Any]]:
    """Images per second of every contender, with one stream and with three at once."""
    found = []
    for size in bench.args.sizes:
        contenders = [c for c in CONTENDERS[size] if _chosen(bench.args, c.library)]
        for num_streams in NUM_STREAMS:
            found += [
                {**c._asdict(), "size": size, "num_streams": num_streams, "rates": []}
                for c in contenders
            ]
        _take_turns(bench, [one for one in found if one["size"] == size])
    return found


def _take_turns(bench: Bench, measured: list[dict[str, Any]]) -> None:
    with ExitStack() as stack:
        workers: dict[tuple[str, ...], Worker] = {}
        for round_, one in itertools.product(range(bench.args.rounds), measured):
            if one["num_streams"] > 1 and round_ >= _SLOW_ROUNDS["three streams"]:
                continue
            contender = Contender(*(one[name] for name in Contender._fields))
            if contender.process not in workers:
                workers[contender.process] = stack.enter_context(Worker())
            path = bench.files[one["size"]][contender.images]
            load = bench.load(one["num_streams"])
            arguments = (contender, path, load, bench.args.seconds)
            one["rates"].append(workers[contender.process].call(images_per_second, *arguments))
            _say(f"round {round_}", *contender, load.num_streams, f"{one['rates'][-1]:.0f}/s")


def measure_start(bench: Bench) -> dict[str, list[float]]:
    """Seconds from a process's start to the first batches of its three streams."""
    found: dict[str, list[float]] = {}
    for _ in range(min(bench.args.rounds, _SLOW_ROUNDS["start"])):
        for library in _chosen(bench.args, OURS, OURS_THREADS):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    seconds = _first_batches(bench, library, {"NUMBA_CACHE_DIR": cache})
                    found.setdefault(f"{library}, {state} cache", []).append(seconds)
        for library in _chosen(bench.args, FFCV):
            found.setdefault(library, []).append(_first_batches(bench, library, {}))
    return found


def _first_batches(bench: Bench, library: str, environment: dict[str, str]) -> float:
    contender = _in_memory(library, max(bench.files))
    path = bench.files[max(bench.files)][contender.images]
    settings = [*contender, path, bench.args.num_workers, bench.args.batch_size]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, HERE / "_first_batches.py", *map(str, settings)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = float(done.stdout.split()[-1]) - start
    _say("start", library, *environment, f"{seconds:.1f} s")
    return seconds


def measure_memory(bench: Bench) -> list[dict[str, Any]]:
    """Seconds and megabytes of three streams, opened one by one, on a small and a huge file."""
    paths = [bench.files[max(bench.files)]["raw"], make_mock(bench.folder / "mock.beton")]
    found = []
    for path, library in itertools.product(paths, _chosen(bench.args, OURS, OURS_THREADS, FFCV)):
        size = 256 if path == paths[-1] else max(bench.files)
        with Worker() as worker:
            opened = worker.call(
                open_one_by_one, _in_memory(library, size), path, bench.load(num_streams=3)
            )
        num_images = inspect_beton(path).num_samples
        streams = [one._asdict() for one in opened]
        found.append({"library": library, "num_images": num_images, "streams": streams})
        _say("memory", library, num_images, opened)
    return found


def measure_growth(bench: Bench) -> list[dict[str, Any]]:
    """Megabytes and threads of a process after few and after many epochs."""
    found = []
    for library in _chosen(bench.args, OURS, OURS_THREADS, FFCV):
        contender = Contender(library, "raw", "", "uint8" if library == FFCV else "float32", 32)
        with Worker() as worker:
            grown = worker.call(grow, contender, bench.files[32]["raw"], bench.load(1))
        found += [{"library": library, **one._asdict()} for one in grown]
        _say("growth", library, grown)
    return found


def measure_conversion(bench: Bench) -> list[dict[str, Any]]:
    """Images per second of our converter and of FFCV's writer."""
    forms = {256: "folder", 32: "arrays"}
    found = [
        {"library": library, "size": size, "images": forms[size], "mode": mode, "rates": []}
        for size, mode in itertools.product(bench.files, ("raw", "jpg"))
        for library in ["ours", *_chosen(bench.args, FFCV)]
    ]
    with ExitStack() as stack:
        workers = {one["library"]: stack.enter_context(Worker()) for one in found[:2]}
        for _, one in itertools.product(
            range(min(bench.args.rounds, _SLOW_ROUNDS["conversion"])), found
        ):
            library, form = one["library"], one["images"]
            source = bench.files[one["size"]][form]
            arguments = (form, source, bench.folder / "converted.beton", one["mode"])
            rate = workers[library].call(CONVERTERS[library], *arguments, bench.args.num_workers)
            one["rates"].append(rate)
            _say("conversion", library, form, one["mode"], f"{rate:.0f}/s")
    return found


def measure_training(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Seconds per cycle of the quickstart's recipe with real and with synthetic batches."""
    found = {}
    for num_ranks in (1, 2):
        result = bench.folder / "training.json"
        sizes = [bench.args.rounds, bench.args.num_cycles]
        environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE.parent)}
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        script = [HERE / "_training.py", bench.files[32]["raw"], result, *sizes]
        subprocess.run(
            [sys.executable, *launcher, f"--nproc_per_node={num_ranks}", *map(str, script)],
            env=os.environ | environment,
            check=True,
        )
        found[f"{num_ranks} ranks"] = json.loads(result.read_text())
        _say("training", found)
    return found


PARTS = {
    "throughput": measure_throughput,
    "start": measure_start,
    "memory": measure_memory,
    "conversion": measure_conversion,
    "training": measure_training,
    "growth": measure_growth,
}


def _in_memory(library: str, size: int) -> Contender:
    """The contender whose start and memory are measured: raw pixels, crop and flip of its own."""
    image_size = 224 if size == 256 else size
    if library == FFCV:
        return Contender(library, "raw", "area", "uint8", image_size)
    return Contender(library, "raw", "bicubic", "float32", image_size)


def _chosen(args: argparse.Namespace, *libraries: str) -> list[str]:
    """Those that the command line wants, if they are installed."""
    return [
        library
        for library in libraries
        if library in args.libraries
        and (library == OURS_THREADS or importlib.util.find_spec(_PACKAGES[library]))
    ]


def _say(*words: Any) -> None:
    print(time.strftime("%X"), *words, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags = parser.add_argument
    flags("--images", type=Path, help="folder of class folders (default: made)")
    flags("--num_images", type=int, default=2000, help="256x256 pictures to make")
    flags("--num_small", type=int, default=10_000, help="32x32 pictures to make")
    flags("--num_workers", type=int, default=2, help="of each stream or loader")
    flags("--batch_size", type=int, default=128)
    flags("--rounds", type=int, default=5, help="turns; what takes long has fewer")
    flags("--seconds", type=float, default=1.0, help="of a turn of throughput")
    flags("--num_cycles", type=int, default=10, help="of training in a turn")
    flags("--sizes", nargs="+", type=int, choices=CONTENDERS, default=list(CONTENDERS))
    flags("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    flags("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    flags("--output", type=Path, default=HERE / "results", help="folder of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
