"""The flags of the evaluation commands, and the types of their values."""

import argparse
from pathlib import Path
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_train_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the images to learn from."""
    parser.add_argument(
        "--train",
        required=True,
        metavar="T.beton",
        help="labelled images to learn from: a .beton file or a folder of class folders",
    )


def add_num_train_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for a part of the training images."""
    parser.add_argument(
        "--num_train_images",
        type=positive_int,
        metavar="N",
        help="use about N training images, every class in proportion (default: all)",
    )


def add_test_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the images to count on."""
    parser.add_argument(
        "--test",
        required=True,
        metavar="V.beton",
        help="labelled images to count on: a .beton file or a folder of class folders",
    )


def add_features_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the features on disk."""
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="folder that keeps the features of all encoders and images, so that none is encoded "
        "twice (default: beside the result)",
    )


def build_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of a command that evaluates one encoder."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        metavar="R.yaml",
        help="a YAML file of these flags, or the name of a shipped one; flags beside it win",
    )
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="a run folder (its newest checkpoint) or one of its checkpoint folders",
    )
    add_weights_arguments(parser, encoder)
    add_test_argument(parser)
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="evaluate the run's encoder as it was before training",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="folder of the result (default: RUN/eval/<evaluation>[_untrained])",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="what the encoder computes in (default: fp32)",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; unused")
    return parser


def add_weights_arguments(parser: argparse.ArgumentParser, encoder: Any) -> None:
    """Add the flags that name other weights than a run's, `--init_from` to another group."""
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


def fraction(text: str) -> float:
    """Parse a flag's share, above zero and at most one."""
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1: give a share such as 0.01")
    return value


def non_negative_int(text: str) -> int:
    """Parse a flag's whole number, zero or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, zero or above")
    return int(text)
