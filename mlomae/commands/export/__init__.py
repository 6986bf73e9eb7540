"""Write a run's weights as timm, Transformers or ONNX load them."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument(
        "--format",
        required=True,
        choices=("timm", "hf", "safetensors", "onnx"),
        help="library that will load the weights",
    )
    parser.add_argument("--output", metavar="DIR", help="a new folder (default: RUN/export/FORMAT)")
    parsed = parser.parse_args(argv)

    from mlomae.commands.export import command  # late, so that --help is quick

    return command.main(parsed.run, parsed.format, parsed.output)
