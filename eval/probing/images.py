"""The images of a linear probe: those it is trained on, those it is counted on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_ffcv import Augmentation, ImagesInfo, inspect_images, split_by_class
from eval.frozen.features import check_class_names, class_labels
from eval.probing.recipe import ProbeRecipe
from mlomae.errors import UserError


@dataclass(frozen=True)
class ProbeImages:
    """Two labelled sets of the same classes.

    Attributes:
        train, test: what the files hold.
        augmentation: of the images that heads are trained on.
        trained: samples of `train` that heads are trained on; None for all.
        held_out: samples of `train` that a head is chosen on; None where none are held out.
    """

    train: ImagesInfo
    test: ImagesInfo
    augmentation: Augmentation
    trained: np.ndarray | None = None
    held_out: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        """Images that heads are trained on."""
        return self.train.num_samples if self.trained is None else len(self.trained)


def find_images(recipe: ProbeRecipe) -> ProbeImages:
    """The images of a recipe, checked against it.

    Raises:
        UserError, DataError: they do not fit it.
    """
    data = recipe.data
    train = _labelled("data.train", data.train, data.num_classes)
    test = _labelled("data.test", data.test, data.num_classes)
    check_class_names(train, test, f"data.train {train.path}", f"data.test {test.path}")
    labels = class_labels(train, f"data.train {train.path}")
    trained = held_out = None
    if recipe.protocol == "held_out":
        trained, held_out = split_by_class(labels, data.held_out_fraction, recipe.seed)
        if not len(held_out):
            raise UserError(
                f"data.train {train.path} has {train.num_samples} images of {train.num_classes} "
                "classes, too few to hold some out: give two or more of a class, or another "
                "protocol"
            )
    augmentation = recipe.train_augmentation
    augmentation.check_fits(train)
    images = ProbeImages(train, test, augmentation, trained, held_out)
    if images.num_images < recipe.probe.batch_size:
        raise UserError(
            f"probe.batch_size is {recipe.probe.batch_size}, but there are {images.num_images} "
            "images to train on: lower it, or give more images"
        )
    return images


def _labelled(key: str, path: Path, num_classes: int) -> ImagesInfo:
    info = inspect_images(path)
    class_labels(info, f"{key} {path}")
    if info.num_classes != num_classes:
        raise UserError(
            f"data.num_classes is {num_classes}, but {key} {path} has {info.num_classes} classes: "
            f"set data.num_classes={info.num_classes}, or give other images"
        )
    return info
