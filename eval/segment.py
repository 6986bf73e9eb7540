"""Train UperNet on a pretrained encoder for semantic segmentation, or evaluate one so trained.

    deepspeed eval/segment.py --recipe R.yaml --deepspeed_config D.json --init_from RUN_OR_FILE \\
        [--resume] [key.subkey=value ...]
    deepspeed eval/segment.py --recipe R.yaml --deepspeed_config D.json --evaluate RUN \\
        [key.subkey=value ...]

--init_from takes a run of this project, or weights of MAE, MAE-CT, timm or Hugging Face; without
it, training starts from random weights. --evaluate trains nothing: it counts on data.test with the
network of a run of this command, and writes output_dir/eval/segment/.

Images come with a mask each, in files that `python -m data_ffcv.convert segmentation` makes.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from eval.segmentation.evaluate import evaluate_trained
from eval.segmentation.program import SegmentationProgram
from eval.segmentation.recipe import SegmentationRecipe
from mlomae.training.command_line import exit_code, launch, parse_arguments, refuse_beside_evaluate
from mlomae.training.program import make_job

logger = logging.getLogger(__name__)


# --- evaluation alone --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    arguments, overrides = parse_arguments(__doc__, argv, _add_evaluate)
    files = arguments.recipe, arguments.deepspeed_config
    if arguments.evaluate is None:
        return launch(SegmentationProgram(), *files, arguments.resume, overrides)

    def work() -> None:
        refuse_beside_evaluate(arguments)
        job = make_job(SegmentationRecipe, *files, overrides=overrides)
        evaluate_trained(job, arguments.evaluate)

    return exit_code(work)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        metavar="RUN",
        help="train nothing: count on data.test with the network of this run",
    )


if __name__ == "__main__":
    sys.exit(main())
