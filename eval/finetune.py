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

import argparse
import sys
from collections.abc import Sequence

from eval.finetuning.evaluate import evaluate
from eval.finetuning.network import build_classifier
from eval.finetuning.program import FinetuningProgram, check_test
from eval.finetuning.recipe import FinetuneRecipe
from mlomae.training.command_line import exit_code, launch, parse_arguments, refuse_beside_evaluate
from mlomae.training.program import make_job


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    arguments, overrides = parse_arguments(__doc__, argv, _add_evaluate)
    files = arguments.recipe, arguments.deepspeed_config
    if arguments.evaluate is None:
        return launch(FinetuningProgram(), *files, arguments.resume, overrides)

    def work() -> None:
        refuse_beside_evaluate(arguments)
        job = make_job(FinetuneRecipe, *files, overrides=overrides)
        vit = build_classifier(job.recipe)
        evaluate(job, vit, arguments.evaluate, check_test(job.recipe))

    return exit_code(work)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        metavar="RUN_OR_FILE",
        help="train nothing: count on data.test with this fine-tuned classifier",
    )


if __name__ == "__main__":
    sys.exit(main())
