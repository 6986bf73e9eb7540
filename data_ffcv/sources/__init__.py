"""Reading image collections as they are published, one sample at a time.

source = open_source("imagefolder", "imagenet/train")
image, mask, notes = source.read(0)
source.classes[source.labels[0]]
"""

from collections.abc import Callable
from pathlib import Path

from data_ffcv.errors import DataError
from data_ffcv.sources.arrays import ArraySource, open_fashion_mnist, open_idx
from data_ffcv.sources.base import IMAGE_SUFFIXES, ImageSource, Sample
from data_ffcv.sources.cifar import open_cifar
from data_ffcv.sources.folder import FolderSource, open_image_folder
from data_ffcv.sources.huggingface import open_hugging_face
from data_ffcv.sources.image import read_image, read_size
from data_ffcv.sources.segmentation import open_segmentation
from data_ffcv.sources.tars import open_tars

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "Sample",
    "default_part",
    "open_source",
    "read_image",
    "read_size",
]

_SETTINGS = {  # format: the settings that it knows
    "imagefolder": ("labels", "classes"),
    "cifar10": ("part", "download"),
    "cifar100": ("part", "download"),
    "fashion-mnist": ("part", "download"),
    "idx": ("part",),
    "segmentation": ("part", "classes", "ignore_index"),
    "webdataset": ("classes",),
    "huggingface": ("part", "classes"),
}
_OPENERS: dict[str, Callable[..., ImageSource]] = {
    "imagefolder": open_image_folder,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "fashion-mnist": open_fashion_mnist,
    "idx": open_idx,
    "segmentation": open_segmentation,
    "webdataset": open_tars,
    "huggingface": open_hugging_face,
}
FORMATS = tuple(_OPENERS)


def default_part(format: str) -> str | None:
    """Returns the part of a collection that is read by default; None where it has no parts."""
    return "train" if "part" in _SETTINGS[format] else None


def open_source(
    format: str,
    path: str | Path,
    *,
    part: str | None = None,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
    ignore_index: int | None = None,
    download: bool = False,
) -> ImageSource:
    """Opens a collection of images.

    Args:
        format: One of `FORMATS`.
        path: The folder, archive or brace pattern that holds it.
        part: Official part of the collection: train (also if None), test, val, ...; not for an
            ImageFolder and a WebDataset, which are taken whole.
        labels: Text file with the label of each image of a flat ImageFolder.
        classes: Text file with one class name per line, or the ``.beton`` whose numbering to take.
        ignore_index: Mask value that means "no class"; larger ones move down by one. 255 always
            does.
        download: Fetch what is missing.

    Raises:
        DataError: the collection is incomplete or not of this format, or a setting is not for it.
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    wanted = {
        "part": part,
        "labels": Path(labels) if labels is not None else None,
        "classes": Path(classes) if classes is not None else None,
        "ignore_index": ignore_index,
        "download": download or None,
    }
    for name, value in wanted.items():
        if value is not None and name not in _SETTINGS[format]:
            raise DataError(f"{name} is not for {format}; leave it out")
    settings = {name: value for name, value in wanted.items() if value is not None}
    default = default_part(format)
    if default is not None:
        settings.setdefault("part", default)
    if format.startswith("cifar"):
        settings["num_classes"] = int(format.removeprefix("cifar"))
    try:
        return _OPENERS[format](Path(path), **settings)
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); allow reading, "
            "or fix or remove it"
        ) from error
