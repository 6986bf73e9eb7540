"""What each level of a pretraining draws from."""

from dataclasses import dataclass, field

import numpy as np

from data_ffcv import Augmentation, ImagesInfo, choose_backend, inspect_images, split_by_class
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import AugmentationRecipe


@dataclass(frozen=True)
class LevelImages:
    """What a level's stream draws from.

    Attributes:
        indices: samples; None for all.
        info: of the file; while it lives, streams share it.
    """

    info: ImagesInfo
    indices: np.ndarray | None
    augmentation: Augmentation = field(compare=False)

    @property
    def num_images(self) -> int:
        """Images that an epoch draws from."""
        return self.info.num_samples if self.indices is None else len(self.indices)


def plan_images(recipe: PretrainingRecipe) -> dict[str, LevelImages]:
    """What each level draws from.

    The mask level gets its share of the labelled images, `classifier` the rest. `pretrain` gets
    the same rest where it trains on these images, all of its own where there is a section
    downstream, and all in plain MAE.

    Raises:
        UserError, DataError: they do not fit the recipe.
    """
    info = inspect_images(recipe.data.train)
    sources: dict[str, tuple[ImagesInfo, np.ndarray | None]] = {"pretrain": (info, None)}
    if recipe.method == "mlo_mae":
        labelled, rest, part = _split_labelled(recipe)
        sources |= {"classifier": (labelled, rest), "mask": (labelled, part)}
        if recipe.downstream is None:
            sources["pretrain"] = labelled, rest
    images = {}
    for name, level in recipe.levels.items():
        augmentation = _augmentation(recipe, name).build(recipe.model.image_size)
        images[name] = LevelImages(*sources[name], augmentation)
        if images[name].num_images < level.batch_size:
            raise UserError(
                f"{name}.batch_size is {level.batch_size}, but its stream has "
                f"{images[name].num_images} images: lower it, or give more images"
            )
        augmentation.check_fits(images[name].info)
        if augmentation.auto_augment and name != "pretrain" and images[name].info.has_masks:
            raise UserError(
                f"auto_augment {augmentation.auto_augment} would turn and shear the images of "
                f'{name}, but not their masks: set downstream.augmentation, with auto_augment ""'
            )
    return images


def _split_labelled(recipe: PretrainingRecipe) -> tuple[ImagesInfo, np.ndarray, np.ndarray]:
    """The images of classifier and mask, and which of them are whose, drawn by class and seed."""
    labelled = recipe.labelled
    section = "data" if recipe.downstream is None else "downstream"
    choose_backend(recipe.data.backend, labelled.train)
    info = inspect_images(labelled.train)
    if info.has_masks != (labelled.task == "segmentation"):
        held, wanted = ("masks", "class labels") if info.has_masks else ("no masks", "masks")
        raise UserError(f"{section}.train {labelled.train} holds {held}: give a file with {wanted}")
    if info.num_classes != labelled.num_classes:
        raise UserError(
            f"{section}.num_classes is {labelled.num_classes}, but {labelled.train} has "
            f"{info.num_classes} classes: set {section}.num_classes={info.num_classes}"
        )
    labels = np.zeros(info.num_samples, int) if info.labels is None else info.labels
    return info, *split_by_class(labels, recipe.data.mask_fraction, recipe.seed)


def _augmentation(recipe: PretrainingRecipe, name: str) -> AugmentationRecipe:
    """The level's own, else that of its labelled images, else that of all."""
    downstream = None if name == "pretrain" else recipe.downstream
    of_labelled = None if downstream is None else downstream.augmentation
    return recipe.levels[name].augmentation or of_labelled or recipe.data.augmentation
