"""What the evaluation commands share: arguments, checks, the result file and the table."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from data_ffcv import DataError
from eval.features import EncodedSets, ImageSets
from mlomae.errors import UserError
from mlomae.models import MaskedAutoencoder
from mlomae.recipe import Recipe
from mlomae.weights import build_model, find_checkpoint, load_model


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the images."""
    parser.add_argument(
        "--train", required=True, metavar="T.beton", help="labelled images to learn from"
    )
    parser.add_argument("--test", required=True, metavar="V.beton", help="images to count on")
    parser.add_argument(
        "--num_train_images",
        type=positive_int,
        metavar="N",
        help="use about N training images, every class in proportion (default: all)",
    )


def build_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of a command that evaluates one encoder."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN",
        help="a run folder (its newest checkpoint) or one of its checkpoint folders",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="evaluate the run's encoder as it was before training",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the JSON result (default: RUN/eval/<evaluation>[_untrained].json)",
    )
    return parser


def positive_int(text: str) -> int:
    """Parse a flag's whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a flag's number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def default_device() -> torch.device:
    """The GPU where there is one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_encoder(checkpoint: Path, *, untrained: bool) -> tuple[MaskedAutoencoder, Recipe]:
    """Return a run's model, or with `untrained` its model as it was before training."""
    model, recipe = load_model(checkpoint)
    return (build_model(recipe) if untrained else model), recipe


def evaluate_encoder(
    args: argparse.Namespace, name: str, evaluate: Callable[[EncodedSets], dict[str, Any]]
) -> None:
    """Run one evaluation of one encoder as the flags say; write and show its result.

    Raises:
        DataError, UserError: An input is bad; nothing has been written.
    """
    start = time.perf_counter()
    sets = ImageSets(args.train, args.test, args.num_train_images)
    model, recipe = load_encoder(args.checkpoint, untrained=args.untrained)
    file = args.output or _default_output(args.checkpoint, name, untrained=args.untrained)
    make_parent(file)
    data = sets.encode(model, recipe, default_device())
    result = {
        "evaluation": name,
        "checkpoint": str(find_checkpoint(args.checkpoint)),
        "untrained": args.untrained,
        "train": args.train,
        "test": args.test,
        **describe(data),
        **evaluate(data),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json(file, result)
    _show(result, file)


def describe(data: EncodedSets) -> dict[str, int]:
    """The counts every result carries."""
    return {
        "num_train_images": len(data.train.labels),
        "num_test_images": len(data.test.labels),
        "num_classes": data.num_classes,
    }


def run(command: Callable[[], None]) -> int:
    """Return the exit code of a command; bad input becomes one sentence and code 2."""
    try:
        command()
    except (UserError, DataError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def make_parent(file: Path) -> None:
    """Create the folder of a result before the work for it starts."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder of {file} cannot be made ({error.strerror}): choose another --output"
        ) from None


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Write a result, replacing an earlier one.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}): choose another --output"
        ) from None


def _default_output(checkpoint: Path, name: str, *, untrained: bool) -> Path:
    """RUN/eval/NAME.json; results of one checkpoint folder get a folder of its name."""
    file = f"{name}_untrained.json" if untrained else f"{name}.json"
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parents[1] / "eval" / checkpoint.name / file
    return checkpoint / "eval" / file


def _show(result: dict[str, Any], file: Path) -> None:
    table = Table(Column("encoder", overflow="fold"), "evaluation", "accuracy", "seconds")
    encoder = "untrained" if result["untrained"] else result["checkpoint"]
    accuracy = f"{100 * result['accuracy']:.2f} %"
    table.add_row(encoder, result["evaluation"], accuracy, f"{result['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"result: {file}", highlight=False, soft_wrap=True)
