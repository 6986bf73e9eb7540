"""Several encoders in one table: k-NN and linear probe, with an untrained encoder as the floor.

    python -m eval.compare --train train.beton --test test.beton --output result.json RUN [RUN ...]

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

from eval import cli, knn, linear_probe
from eval.features import ImageSets
from mlomae.models import MaskedAutoencoder
from mlomae.recipe import Recipe
from mlomae.weights import find_checkpoint


def compare(checkpoints: list[Path], sets: ImageSets, device: torch.device) -> list[dict[str, Any]]:
    """Evaluate every run, then the first one's encoder as it was before training.

    Returns:
        One row per encoder: its name (the run's method, or `untrained`), checkpoint, the results
        of `knn` and `linear_probe`, and seconds.

    Raises:
        UserError: A run or its checkpoint is missing.
    """
    encoders = []
    for checkpoint in checkpoints:
        model, recipe = cli.load_encoder(checkpoint, untrained=False)
        encoders.append((recipe.method, checkpoint, model, recipe))
    model, recipe = cli.load_encoder(checkpoints[0], untrained=True)
    encoders.append(("untrained", checkpoints[0], model, recipe))
    return [
        {
            "encoder": name,
            "checkpoint": str(find_checkpoint(checkpoint)),
            **_evaluate(model, recipe, sets, device),
        }
        for name, checkpoint, model, recipe in encoders
    ]


def _evaluate(
    model: MaskedAutoencoder, recipe: Recipe, sets: ImageSets, device: torch.device
) -> dict[str, Any]:
    start = time.perf_counter()
    data = sets.encode(model, recipe, device)
    return {
        **cli.describe(data),
        "knn": knn.evaluate(data, knn.KnnSettings()),
        "linear_probe": linear_probe.evaluate(data, linear_probe.ProbeSettings()),
        "seconds": round(time.perf_counter() - start, 3),
    }


def _show(rows: list[dict[str, Any]], file: Path) -> None:
    table = Table("encoder", "k-NN", "linear probe", Column("checkpoint", overflow="fold"))
    for row in rows:
        accuracies = [f"{100 * row[name]['accuracy']:.2f} %" for name in ("knn", "linear_probe")]
        table.add_row(row["encoder"], *accuracies, row["checkpoint"])
    console = Console()
    console.print(table)
    console.print(f"result: {file}", highlight=False, soft_wrap=True)


def _run(args: argparse.Namespace) -> None:
    sets = ImageSets(args.train, args.test, args.num_train_images)
    cli.make_parent(args.output)
    rows = compare(args.checkpoints, sets, cli.default_device())
    cli.write_json(args.output, {"train": args.train, "test": args.test, "encoders": rows})
    _show(rows, args.output)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="RUN", help="run or checkpoint folders"
    )
    cli.add_data_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON result")
    args = parser.parse_args(argv)
    return cli.run(lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
