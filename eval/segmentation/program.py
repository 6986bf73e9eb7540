"""The segmentation program: UperNet from a recipe to an engine and images."""

from typing import NamedTuple

import torch

from data_ffcv import BetonInfo, choose_backend, inspect_images
from data_ffcv.inspect import count_pixels
from eval.frozen.features import check_class_names
from eval.segmentation.metrics import IGNORED
from eval.segmentation.recipe import LEVEL, SegmentationRecipe
from eval.segmentation.task import ENCODER, SegmentationLoss, SegmentationTask
from mlomae.errors import UserError
from mlomae.models.upernet import UperNet
from mlomae.training.layer_decay import layer_decay_groups
from mlomae.training.program import Job, Program
from mlomae.training.task import count_cycles
from mlomae.training.vit import build_vit, check_encoder, load_encoder, warn_of_other_pixels


class SegmentationImages(NamedTuple):
    """What a recipe's data section names."""

    train: BetonInfo
    test: BetonInfo


class SegmentationProgram(Program[SegmentationRecipe]):
    """Training of encoder, neck and heads.

    Attributes:
        images: once `check` has looked at them.
    """

    schema = SegmentationRecipe
    images: SegmentationImages

    def module(self, recipe: SegmentationRecipe, name: str = LEVEL) -> UperNet:
        """The network as it is without weights to start from."""
        return build_network(recipe)

    def check(self, job: Job[SegmentationRecipe]) -> None:
        """Images and initial weights must fit the recipe."""
        self.images = check_images(job.recipe)
        recipe = job.recipe
        if recipe.init_from and not job.is_continued:
            check_encoder(recipe.model, recipe.init_from, recipe.init_from_expected)
            warn_of_other_pixels(recipe)

    def build(self, job: Job[SegmentationRecipe]) -> SegmentationTask:
        """The engine, filled with the initial weights."""
        recipe = job.recipe
        network = build_network(recipe) if job.is_continued else initial_network(recipe)
        section = recipe.segmentation
        level = job.build_level(
            LEVEL,
            network,
            loss=SegmentationLoss(recipe.head.auxiliary_weight),
            num_cycles=count_cycles(recipe, self.images.train.num_samples),
            param_groups=layer_decay_groups(network, section, section.layer_decay, ENCODER),
        )
        return SegmentationTask(recipe, level, *self.images, lambda: build_network(recipe))


def build_network(recipe: SegmentationRecipe) -> UperNet:
    """An untrained network: MAE's initial values in the encoder, PyTorch's elsewhere."""
    head = recipe.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vit = build_vit(recipe.model, init_values=recipe.model.layer_scale, dynamic_img_size=True)
        return UperNet(
            vit,
            recipe.data.num_classes,
            preset=head.preset,
            channels=head.channels,
            auxiliary=head.auxiliary_weight > 0,
            dropout=head.dropout,
        )


def initial_network(recipe: SegmentationRecipe) -> UperNet:
    """The network that training starts from: untrained, but for the encoder of init_from.

    Raises:
        UserError: these weights do not fit.
    """
    network = build_network(recipe)
    if recipe.init_from:
        weights = recipe.init_from, recipe.init_from_expected
        load_encoder(network.backbone, recipe.model, *weights)
    return network


def check_images(recipe: SegmentationRecipe) -> SegmentationImages:
    """The images of a recipe, if they fit it.

    Raises:
        UserError, DataError: they do not; names the key.
    """
    data = recipe.data
    train, test = check_masks(recipe, "train"), check_masks(recipe, "test")
    check_class_names(train, test, f"data.train {data.train}", f"data.test {data.test}")
    recipe.check_num_images(train.num_samples)
    choose_backend(data.backend, data.test)
    recipe.train_augmentation.check_fits(train)
    return SegmentationImages(train, test)


def check_masks(recipe: SegmentationRecipe, key: str) -> BetonInfo:
    """The file of data.train or data.test, if it holds masks of as many classes as the recipe.

    Looks at 500 masks; the streams look at all.
    """
    path = getattr(recipe.data, key)
    info = inspect_images(path)
    if not isinstance(info, BetonInfo) or not info.has_masks:
        raise UserError(
            f"data.{key} {path} holds no masks: give a file of python -m data_ffcv.convert "
            "segmentation"
        )
    if info.num_classes != recipe.data.num_classes:
        raise UserError(
            f"data.num_classes is {recipe.data.num_classes}, but {path} has {info.num_classes} "
            f"classes: set data.num_classes={info.num_classes}, or convert with the right --classes"
        )
    _, num_pixels = count_pixels(info)
    if num_pixels[info.num_classes : IGNORED].any():
        largest = num_pixels[:IGNORED].nonzero()[0].max()
        raise UserError(
            f"data.{key} {path} has masks with the value {largest}, but {info.num_classes} classes "
            "(and 255 for none): convert it again with the right --classes or --ignore_index"
        )
    return info
