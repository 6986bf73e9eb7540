"""Features of whole images: what the frozen encoder makes of a training and a test file."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_ffcv import (
    Augmentation,
    EvalLoader,
    ImagesInfo,
    inspect_images,
    open_eval_loader,
    split_by_class,
)
from data_ffcv.sources import open_source
from eval.frozen.encoders import Encoder
from eval.frozen.processes import tracked
from eval.frozen.store import Features, FeatureStore
from mlomae.distributed.collectives import all_agree, barrier, rank, world_size
from mlomae.distributed.watchdog import mark
from mlomae.errors import UserError

BATCH_SIZE = 256
_SUBSET_SEED = 0


class LabelledFeatures(NamedTuple):
    """Features of a set of images with the class of each."""

    features: Features  # n rows, float32 [D] each
    labels: Tensor  # int64 [n], on the CPU


@dataclass(frozen=True)
class EncodedSets:
    """What an evaluation reads: features of a training and a test set."""

    train: LabelledFeatures
    test: LabelledFeatures
    num_classes: int


class ImageSet:
    """A file of labelled images, or some of them.

    Attributes:
        info: the whole file.
        indices: the images used, a sorted int64 array, or None for all.
    """

    def __init__(self, path: str | Path, indices: np.ndarray | None = None) -> None:
        """Checks the file, a ``.beton`` or a folder of class folders.

        Raises:
            DataError: it is missing or damaged.
            UserError: it holds masks.
        """
        self.info = inspect_images(path)
        self.indices = indices
        class_labels(self.info, str(path))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> np.ndarray:
        """Class of each image used, int64 [n]."""
        labels = class_labels(self.info, str(self.info.path))
        return labels if self.indices is None else labels[self.indices]

    def loader(
        self,
        encoder: Encoder,
        device: torch.device,
        rows: np.ndarray,
    ) -> EvalLoader:
        """The un-augmented images of some rows of this set, normalised as the encoder wants."""
        indices = np.arange(self.info.num_samples) if self.indices is None else self.indices
        return open_eval_loader(
            self.info.path,
            augmentation=eval_augmentation(self.info, encoder.model.image_size),
            batch_size=BATCH_SIZE,
            mean=encoder.mean,
            std=encoder.std,
            indices=indices[rows],
            num_workers=encoder.num_workers,
            device=device,
        )

    def encode(self, encoder: Encoder, folder: Path, device: torch.device) -> LabelledFeatures:
        """Features of the images, read from the folder or encoded into it. All ranks must call.

        Every rank encodes its share of the chunks which are not there yet; the batches are the same
        for any number of ranks. The features of all images of a file serve any part of them.

        Raises:
            UserError: the folder cannot be written, or is not the same one on all ranks.
        """
        labels = torch.from_numpy(np.asarray(self.labels, np.int64))
        identity = _identity(encoder, self.info)
        if self.indices is not None:
            whole = FeatureStore(folder, identity, self.info.num_samples)
            if all_agree(whole.is_complete()):
                return LabelledFeatures(whole.read()[self.indices], labels)
            identity["indices"] = hashlib.sha256(self.indices.tobytes()).hexdigest()
        store = FeatureStore(folder, identity, len(self))
        store.prepare()
        self._fill(store, encoder, device)
        barrier()
        return LabelledFeatures(store.read(), labels)

    def _fill(self, store: FeatureStore, encoder: Encoder, device: torch.device) -> None:
        mine = [n for n in range(rank(), store.num_chunks, world_size()) if not store.has(n)]
        if not mine:
            return
        rows = np.concatenate([store.rows(number) for number in mine])
        batches = extract_features(encoder.model, self.loader(encoder, device, rows), device)
        for number in mine:
            num_batches = -(-len(store.rows(number)) // BATCH_SIZE)
            store.write(number, torch.cat([next(batches) for _ in range(num_batches)]))
        next(batches, None)  # lets the loader and the progress bar end


class ImageSets:
    """A training and a test set with the same classes.

    Attributes:
        train: whose labels an evaluation learns from.
        test: on which it is counted.
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
        self.train, self.test = ImageSet(train), ImageSet(test)
        _check_same_classes(self.train.info, self.test.info)
        if num_train_images is not None and num_train_images < len(self.train):
            fraction = num_train_images / len(self.train)
            _, self.train.indices = split_by_class(self.train.labels, fraction, _SUBSET_SEED)

    @property
    def num_classes(self) -> int:
        """Classes of both files."""
        return self.train.info.num_classes

    def encode(self, encoder: Encoder, folder: Path, device: torch.device) -> EncodedSets:
        """Features of both sets, see `ImageSet.encode`. All ranks must call."""
        train, test = (s.encode(encoder, folder, device) for s in (self.train, self.test))
        return EncodedSets(train, test, self.num_classes)


@torch.no_grad()
def extract_features(
    model: nn.Module, loader: EvalLoader, device: torch.device
) -> Iterator[Tensor]:
    """Yield the features of each batch of a loader, float32 [B, D] on the CPU.

    The first rank shows a progress bar.
    """
    model = model.to(device).eval()
    title = f"features of {loader.info.path.name}"
    for images, _ in tracked(loader, title):
        mark("computing features")
        yield model(images.to(device)).float().cpu()


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


def _identity(encoder: Encoder, info: ImagesInfo) -> dict[str, Any]:
    """What decides the features of all images of a file."""
    model = encoder.model
    return {
        "encoder": encoder.fingerprint,
        "image_size": list(model.image_size),
        "num_heads": model.num_heads,
        "global_pool": model.global_pool,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "augmentation": repr(asdict(eval_augmentation(info, model.image_size))),
        "images": str(info.path.resolve()),
        "num_images": info.num_samples,
        "version": _version(info),
    }


def _version(info: ImagesInfo) -> str:
    """Changes with the size or time of a file, or of any image of a folder of class folders."""
    if info.path.is_file():
        return _file_version(info.path)
    # An image that is overwritten leaves its folder's time as it was, so each one is asked.
    source = open_source("imagefolder", info.path)
    names = (source.name(number) for number in range(info.num_samples))
    versions = [(os.path.relpath(name, info.path), _file_version(name)) for name in names]
    return hashlib.sha256(repr(versions).encode()).hexdigest()


def _file_version(path: str | Path) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): fix it or take it out of its folder"
        ) from None
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def class_labels(info: ImagesInfo, name: str) -> np.ndarray:
    """Class of each image of a file or folder, int64 [num_samples].

    Args:
        name: what the error calls it.

    Raises:
        UserError: it holds masks.
    """
    if info.labels is None:
        raise UserError(f"{name} holds masks: give a file with class labels")
    return info.labels


def _check_same_classes(train: ImagesInfo, test: ImagesInfo) -> None:
    if train.num_classes != test.num_classes:
        raise UserError(
            f"{train.path} has {train.num_classes} classes, but {test.path} has "
            f"{test.num_classes}: convert both from folders with the same classes"
        )
    check_class_names(train, test, str(train.path), str(test.path))


def check_class_names(train: ImagesInfo, test: ImagesInfo, train_name: str, test_name: str) -> None:
    """Refuse two sets of as many classes with other names, or with the same ones in other order.

    Args:
        train_name, test_name: what the error calls the two.

    Raises:
        UserError: names the first class that differs.
    """
    for ours, theirs in zip(train.classes, test.classes, strict=True):
        if ours != theirs:
            raise UserError(
                f"the class '{ours}' of {train_name} is '{theirs}' in {test_name}: give two sets "
                "with the same classes"
            )
