"""Fine-tune a pretrained encoder as a classifier, or evaluate one that was fine-tuned.

    deepspeed eval/finetune.py --recipe R.yaml --deepspeed_config D.json --init_from RUN_OR_FILE \\
        [--resume] [key.subkey=value ...]
    deepspeed eval/finetune.py --recipe R.yaml --deepspeed_config D.json --evaluate RUN_OR_FILE \\
        [key.subkey=value ...]

--init_from takes a run of this project, or weights of MAE, MAE-CT, timm or Hugging Face; without
it, training starts from random weights. --evaluate trains nothing: it counts on data.test with a
classifier that was fine-tuned before, a run (then RUN/recipe.yaml is its recipe) or a file such as
mae_finetuned_vit_base.pth, and writes output_dir/eval/finetune/result.json.
"""

import sys
from collections.abc import Sequence

from eval.finetuning.evaluate import evaluate_trained
from eval.finetuning.program import FinetuningProgram
from mlomae.training.command_line import train_or_evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    return train_or_evaluate(
        FinetuningProgram(),
        __doc__,
        argv,
        evaluate_trained,
        metavar="RUN_OR_FILE",
        help="train nothing: count on data.test with this fine-tuned classifier",
    )


if __name__ == "__main__":
    sys.exit(main())
