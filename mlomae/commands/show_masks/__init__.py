"""Draw the masks of a run on your images."""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mlomae show-masks", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder of images")
    parser.add_argument(
        "--output", metavar="FILE", help="the picture (default: RUN/masks_<name of DIR>.png)"
    )
    parser.add_argument("--num_images", type=int, default=8, help="rows (default: %(default)s)")
    parsed = parser.parse_args(argv)

    from mlomae.commands.show_masks import command  # late, so that --help is quick

    return command.main(parsed.run, parsed.images, parsed.output, parsed.num_images)
