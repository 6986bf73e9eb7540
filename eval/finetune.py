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
from typing import NamedTuple

from torch import nn

from data_ffcv import ImagesInfo, choose_backend
from eval._finetune_evaluate import evaluate
from eval._finetune_network import build_classifier, check_start, start
from eval._finetune_recipe import LEVEL, FinetuneRecipe
from eval._finetune_task import (
    Finetuning,
    soft_cross_entropy,
    test_augmentation,
    train_augmentation,
)
from eval._layer_decay import layer_decay_groups
from eval.features import ImageSet, ImageSets
from mlomae._ranks import launched_world_size
from mlomae.errors import UserError
from mlomae.program import (
    Job,
    Program,
    exit_code,
    launch,
    make_job,
    parse_arguments,
    refuse_beside_evaluate,
)
from mlomae.task import count_cycles


class Images(NamedTuple):
    """What a recipe's data section names."""

    train: ImagesInfo
    test: ImagesInfo


class FinetuningProgram(Program[FinetuneRecipe]):
    """Fine-tuning of encoder and head.

    Attributes:
        images: once `check` has looked at them.
    """

    schema = FinetuneRecipe
    images: Images

    def module(self, recipe: FinetuneRecipe, name: str = LEVEL) -> nn.Module:
        """Encoder and head as they are without weights to start from."""
        return build_classifier(recipe)

    def check(self, job: Job[FinetuneRecipe]) -> None:
        """Images and initial weights must fit the recipe."""
        self.images = check_images(job.recipe)
        if not job.is_continued:
            check_start(job.recipe)

    def build(self, job: Job[FinetuneRecipe]) -> Finetuning:
        """The engine, filled with the initial weights."""
        recipe = job.recipe
        vit = build_classifier(recipe)
        if not job.is_continued:
            start(vit, recipe)
        level = job.build_level(
            LEVEL,
            vit,
            loss=soft_cross_entropy,
            num_cycles=count_cycles(recipe, self.images.train.num_samples),
            param_groups=layer_decay_groups(vit, recipe.finetune, recipe.finetune.layer_decay),
        )
        return Finetuning(recipe, level, *self.images, lambda: build_classifier(recipe))


def check_images(recipe: FinetuneRecipe) -> Images:
    """The images of a recipe, if they fit it and each other.

    Raises:
        UserError, DataError: they do not; names the key.
    """
    data, level = recipe.data, recipe.finetune
    images = Images(ImageSets(data.train, data.test).train.info, check_test(recipe))
    if images.train.num_samples < level.batch_size:
        raise UserError(
            f"{LEVEL}.batch_size is {level.batch_size}, but {data.train} has "
            f"{images.train.num_samples} images: lower it, or give more images"
        )
    if recipe.mixup is not None and (each := level.batch_size // launched_world_size()) % 2:
        raise UserError(
            f"mixup mixes pairs, but {LEVEL}.batch_size {level.batch_size} gives each rank {each} "
            "images, an odd number: choose another batch size, or set mixup=null"
        )
    train_augmentation(recipe).check_fits(images.train)
    return images


def check_test(recipe: FinetuneRecipe) -> ImagesInfo:
    """The test images of a recipe, if they fit it.

    Raises:
        UserError, DataError: they do not; names the key.
    """
    data, info = recipe.data, ImageSet(recipe.data.test).info
    if info.num_classes != data.num_classes:
        raise UserError(
            f"data.num_classes is {data.num_classes}, but {data.test} has {info.num_classes} "
            f"classes: set data.num_classes={info.num_classes}"
        )
    choose_backend(data.backend, data.test)
    test_augmentation(recipe, info).check_fits(info)
    return info


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
