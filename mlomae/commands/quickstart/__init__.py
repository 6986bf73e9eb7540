"""Train on small images, from data to a report, in minutes."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae quickstart", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="(default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train/ and test/")
    parsed = parser.parse_args(argv)

    from mlomae.commands.quickstart import command  # late, so that --help is quick

    return command.main(parsed.output, parsed.data)
