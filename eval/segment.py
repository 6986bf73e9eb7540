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

import sys
from collections.abc import Sequence

from eval.segmentation.evaluate import evaluate_trained
from eval.segmentation.program import SegmentationProgram
from mlomae.training.command_line import train_or_evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    return train_or_evaluate(
        SegmentationProgram(),
        __doc__,
        argv,
        evaluate_trained,
        metavar="RUN",
        help="train nothing: count on data.test with the network of this run",
    )


if __name__ == "__main__":
    sys.exit(main())
