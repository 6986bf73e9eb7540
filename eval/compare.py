"""Several encoders in one table: k-NN and cached probe, with an untrained encoder as the floor.

    python -m eval.compare --train train.beton --test test.beton --output result.json \\
        [RUN ...] [--init_from PATH ...]

Every encoder sees the images once, both evaluations then share its features.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from eval import cached_probe, knn
from eval.frozen import cli, flags
from eval.frozen import result as _result
from eval.frozen.encoders import Encoder, of_run
from eval.frozen.features import ImageSets
from mlomae.distributed.collectives import rank
from mlomae.errors import UserError


def compare(
    encoders: list[Encoder], sets: ImageSets, features: Path, device: torch.device
) -> list[dict[str, Any]]:
    """Evaluate every encoder, with its features on disk in a folder. All ranks must call.

    Returns:
        One row per encoder: its name, source, the results of `knn` and `cached_probe`, and seconds.
    """
    return [
        {"encoder": encoder.name, **encoder.source, **_evaluate(encoder, sets, features, device)}
        for encoder in encoders
    ]


def _evaluate(
    encoder: Encoder, sets: ImageSets, features: Path, device: torch.device
) -> dict[str, Any]:
    start = time.perf_counter()
    data = sets.encode(encoder, features, device)
    return {
        **cli.describe(data),
        "knn": knn.evaluate(data, knn.KnnSettings(), device),
        "cached_probe": cached_probe.evaluate(data, cached_probe.ProbeSettings(), device),
        "seconds": round(time.perf_counter() - start, 3),
    }


def _encoders(args: argparse.Namespace) -> list[Encoder]:
    """Runs, other weights, and the first run's encoder as it was before training."""
    if not args.init_from:
        cli.refuse_weights_flags(args, "a run")
    if not args.checkpoints and not args.init_from:
        raise UserError("there is nothing to compare: give runs, or weights with --init_from")
    runs = [of_run(checkpoint) for checkpoint in args.checkpoints]
    others = [cli.pretrained_encoder(args, [path]) for path in args.init_from or []]
    floor = [of_run(run, untrained=True) for run in args.checkpoints[:1]]
    return [*runs, *others, *floor]


def _show(rows: list[dict[str, Any]], file: Path) -> None:
    table = Table("encoder", "k-NN", "cached probe", Column("checkpoint", overflow="fold"))
    for row in rows:
        accuracies = [f"{100 * row[name]['accuracy']:.2f} %" for name in ("knn", "cached_probe")]
        source = row.get("checkpoint") or row["init_from"][0]
        table.add_row(row["encoder"], *accuracies, source)
    console = Console()
    console.print(table)
    console.print(f"result: {file}", highlight=False, soft_wrap=True)


def _run(args: argparse.Namespace) -> None:
    sets = ImageSets(args.train, args.test, args.num_train_images)
    encoders = _encoders(args)
    features = args.features or args.output.parent / "features"
    _result.make_folder(args.output.parent, "--output")
    rows = compare(encoders, sets, features, cli.default_device())
    if rank() == 0:
        _result.write_json(args.output, {"train": args.train, "test": args.test, "encoders": rows})
        _show(rows, args.output)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints", nargs="*", type=Path, metavar="RUN", help="run or checkpoint folders"
    )
    flags.add_weights_arguments(parser, parser)
    flags.add_train_argument(parser)
    flags.add_num_train_argument(parser)
    flags.add_test_argument(parser)
    flags.add_features_argument(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # of the launcher
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON result")
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())
