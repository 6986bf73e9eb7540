"""Features of whole images: what the frozen encoder says about a training and a test file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from data_ffcv import (
    Augmentation,
    EvalLoader,
    ImagesInfo,
    inspect_images,
    open_eval_loader,
    split_by_class,
)
from eval.encoders import Encoder
from mlomae.errors import UserError
from mlomae.models import MaskedAutoencoder

_BATCH_SIZE = 256
_SUBSET_SEED = 0


class LabelledFeatures(NamedTuple):
    """Class-token features with the class of each image."""

    features: Tensor  # float32 [n, D]
    labels: Tensor  # int64 [n]


@dataclass(frozen=True)
class EncodedSets:
    """What an evaluation reads: features of both files, on one device."""

    train: LabelledFeatures
    test: LabelledFeatures
    num_classes: int


class ImageSets:
    """A training and a test file with the same classes.

    Attributes:
        train: The file whose labels an evaluation learns from.
        test: The file on which it is counted.
        train_indices: The training images used, a sorted int64 array, or None for all.
    """

    def __init__(
        self, train: str | Path, test: str | Path, num_train_images: int | None = None
    ) -> None:
        """Checks both files.

        Args:
            train: A ``.beton`` file or a folder of class folders.
            test: Likewise.
            num_train_images: Use only about so many training images, every class in proportion;
                None or more than there are for all.

        Raises:
            DataError: A file is missing or damaged.
            UserError: The files differ in their classes.
        """
        self.train, self.test = inspect_images(train), inspect_images(test)
        _check_same_classes(self.train, self.test)
        self.train_indices = None
        if num_train_images is not None and num_train_images < self.train.num_samples:
            fraction = num_train_images / self.train.num_samples
            _, self.train_indices = split_by_class(self.train.labels, fraction, _SUBSET_SEED)

    def encode(self, encoder: Encoder, device: torch.device) -> EncodedSets:
        """Features of both files from un-augmented images, normalised as the encoder wants."""
        model = encoder.model.to(device).eval()

        def loader(info: ImagesInfo) -> EvalLoader:
            return open_eval_loader(
                info.path,
                augmentation=eval_augmentation(info, model.image_size),
                batch_size=_BATCH_SIZE,
                mean=encoder.mean,
                std=encoder.std,
                indices=self.train_indices if info is self.train else None,
                num_workers=encoder.num_workers,
                device=device,
            )

        return EncodedSets(
            extract_features(model, loader(self.train), device),
            extract_features(model, loader(self.test), device),
            self.train.num_classes,
        )


def extract_features(
    model: MaskedAutoencoder, loader: EvalLoader, device: torch.device
) -> LabelledFeatures:
    """Class-token features of every image of a loader, in its order, on the device.

    Shows a progress bar. The model runs as it comes: in eval mode, and on the device.
    """
    features, labels = [], []
    with torch.no_grad():
        for images, targets in track(loader, f"features of {loader.info.path.name}"):
            features.append(model(images.to(device)).float())
            labels.append(targets.to(device))
        return LabelledFeatures(torch.cat(features), torch.cat(labels))


def eval_augmentation(info: ImagesInfo, image_size: int | tuple[int, int]) -> Augmentation:
    """The usual crop of evaluation: 224 out of 256 pixels, in the ratio of the image size.

    Files whose images all have the wanted size, such as Fashion-MNIST or CIFAR, are taken whole.
    """
    whole = Augmentation(kind="center_crop", image_size=image_size)
    smallest, largest = (info.min_height, info.min_width), (info.max_height, info.max_width)
    if smallest == largest == (whole.height, whole.width):
        return whole
    height, width = round(whole.height * 256 / 224), round(whole.width * 256 / 224)
    return replace(whole, resize=height if height == width else (height, width))


def _check_same_classes(train: ImagesInfo, test: ImagesInfo) -> None:
    for info in (train, test):
        if info.labels is None:
            raise UserError(f"{info.path} holds masks: give a file with class labels")
    if train.num_classes != test.num_classes:
        raise UserError(
            f"{train.path} has {train.num_classes} classes, but {test.path} has "
            f"{test.num_classes}: convert both from folders with the same classes"
        )
    for mine, other in zip(train.classes, test.classes, strict=True):
        if mine != other:
            raise UserError(
                f"the class '{mine}' of {train.path} is '{other}' in {test.path}: convert both "
                "from folders with the same classes"
            )
