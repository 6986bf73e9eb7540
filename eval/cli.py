"""What the evaluation commands share: arguments, checks, the result file and the table."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from data_ffcv import DataError
from eval.encoders import Encoder, of_run, of_weights
from eval.features import EncodedSets, ImageSets
from mlomae.errors import UserError


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the images."""
    parser.add_argument(
        "--train",
        required=True,
        metavar="T.beton",
        help="labelled images to learn from: a .beton file or a folder of class folders",
    )
    parser.add_argument(
        "--test", required=True, metavar="V.beton", help="images to count on; likewise"
    )
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
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="a run folder (its newest checkpoint) or one of its checkpoint folders",
    )
    add_weights_arguments(parser, encoder)
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


def add_weights_arguments(parser: argparse.ArgumentParser, encoder: Any) -> None:
    """Add the flags that name other weights than a run's, `--init_from` to a group of its own."""
    encoder.add_argument(
        "--init_from",
        action="append",
        metavar="PATH",
        help="weights of MAE, MAE-CT, timm or Hugging Face, a file or a folder",
    )
    parser.add_argument(
        "--init_from_expected",
        action="append",
        default=[],
        metavar="NAME",
        help="a name, with * for any text, that may be missing from them or left over",
    )
    parser.add_argument(
        "--image_size",
        type=positive_int,
        metavar="PIXELS",
        help="with --init_from: another than theirs; positions are interpolated",
    )
    parser.add_argument(
        "--num_heads",
        type=positive_int,
        metavar="N",
        help="with --init_from: attention heads, for widths that are not published",
    )
    parser.add_argument(
        "--global_pool",
        choices=("token", "avg"),
        help="with --init_from: the class token, or the mean of the patch tokens (default: as the "
        "file beside the weights says, else token)",
    )


def refuse_weights_flags(args: argparse.Namespace, instead: str) -> None:
    """Refuse flags that only `--init_from` heeds."""
    for flag in ("init_from_expected", "image_size", "num_heads", "global_pool"):
        if getattr(args, flag):
            raise UserError(f"--{flag} is for --init_from, and {instead} has its recipe: remove it")


def foreign_encoder(args: argparse.Namespace, paths: Sequence[str]) -> Encoder:
    """The encoder of weights that are no run's, as the flags say."""
    return of_weights(
        paths,
        image_size=args.image_size,
        global_pool=args.global_pool,
        num_heads=args.num_heads,
        expected=args.init_from_expected,
    )


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


def evaluate_encoder(
    args: argparse.Namespace, name: str, evaluate: Callable[[EncodedSets], dict[str, Any]]
) -> None:
    """Run one evaluation of one encoder as the flags say; write and show its result.

    Raises:
        DataError, UserError: An input is bad; nothing has been written.
    """
    start = time.perf_counter()
    sets = ImageSets(args.train, args.test, args.num_train_images)
    encoder = _encoder(args)
    file = args.output or _default_output(args.checkpoint, name, untrained=args.untrained)
    make_parent(file)
    data = sets.encode(encoder, default_device())
    result = {
        "evaluation": name,
        "encoder": encoder.name,
        **encoder.source,
        "train": args.train,
        "test": args.test,
        **describe(data),
        **evaluate(data),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json(file, result)
    _show(result, file)


def _encoder(args: argparse.Namespace) -> Encoder:
    if args.checkpoint is not None:
        refuse_weights_flags(args, "--checkpoint")
        return of_run(args.checkpoint, untrained=args.untrained)
    if args.untrained:
        raise UserError("--untrained is for a run: give --checkpoint instead of --init_from")
    if args.output is None:
        raise UserError("--output is missing: weights that are no run's have no folder for it")
    return foreign_encoder(args, args.init_from)


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
    source = result.get("checkpoint") or " and ".join(result["init_from"])
    encoder = result["encoder"] if result.get("untrained") else source
    accuracy = f"{100 * result['accuracy']:.2f} %"
    table.add_row(encoder, result["evaluation"], accuracy, f"{result['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"result: {file}", highlight=False, soft_wrap=True)
