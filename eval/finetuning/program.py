"""The fine-tuning program: from a recipe to an engine and images."""

from typing import NamedTuple

from torch import nn

from data_ffcv import ImagesInfo, choose_backend
from eval.finetuning.network import build_classifier, check_start, start
from eval.finetuning.recipe import LEVEL, FinetuneRecipe
from eval.finetuning.task import Finetuning, soft_cross_entropy, test_augmentation
from eval.frozen.features import ImageSet, ImageSets
from mlomae.distributed.start import launched_world_size
from mlomae.errors import UserError
from mlomae.training.layer_decay import layer_decay_groups
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles


class FinetuneImages(NamedTuple):
    """What a recipe's data section names."""

    train: ImagesInfo
    test: ImagesInfo


class FinetuningProgram(Program[FinetuneRecipe]):
    """Fine-tuning of encoder and head.

    Attributes:
        images: once `check` has looked at them.
    """

    schema = FinetuneRecipe
    images: FinetuneImages

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


def check_images(recipe: FinetuneRecipe) -> FinetuneImages:
    """The images of a recipe, if they fit it and each other.

    Raises:
        UserError, DataError: they do not; names the key.
    """
    data, level = recipe.data, recipe.finetune
    images = FinetuneImages(ImageSets(data.train, data.test).train.info, check_test(recipe))
    recipe.check_num_images(images.train.num_samples)
    if recipe.mixup is not None and (each := level.batch_size // launched_world_size()) % 2:
        raise UserError(
            f"mixup mixes pairs, but {LEVEL}.batch_size {level.batch_size} gives each rank {each} "
            "images, an odd number: choose another batch size, or set mixup=null"
        )
    recipe.train_augmentation.check_fits(images.train)
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
