"""The contenders of `data_loading.py`: each opens an endless iterator of (images, labels).

No contender's epoch ends while it is measured, so what an epoch's start costs (FFCV: new buffers;
DataLoader: new processes) is in nobody's time.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS, OURS_THREADS, FFCV = "ours-ffcv", "ours-threads", "ffcv"
DATA_LOADER, WEBDATASET = "dataloader", "webdataset"
LIBRARIES = (OURS, OURS_THREADS, FFCV, DATA_LOADER, WEBDATASET)
_MANY = 3_000_000  # samples of an epoch that does not end


class Contender(NamedTuple):
    """What is measured.

    Attributes:
        library: who loads.
        images: the form of the images, a key of `Files`.
        resize: area, bicubic or bilinear; "" for crops that are not resized.
        gives: type of the pixels that are handed out; float32 is normalised.
        image_size: height and width of what is handed out.
    """

    library: str
    images: str
    resize: str
    gives: str = "float32"
    image_size: int = 224

    @property
    def process(self) -> tuple[str, ...]:
        """Contenders with the same value share a process; FFCV's compile, and share none."""
        return tuple(map(str, self)) if self.library == FFCV else (self.library.split("-")[0],)

    def cells(self) -> list[str]:
        """What a row of a table says about it."""
        crop = self.resize or "padded crop"
        form = {"float32": "float32, normalised", "uint8": "uint8"}[self.gives]
        return [self.library, self.images, crop, form]


def _of_size_256() -> list[Contender]:
    two = ("area", "bicubic")
    found = [
        Contender(OURS, images, resize, gives)
        for gives in ("float32", "uint8")
        for images in ("raw", "jpg")
        for resize in two
    ]
    found += [Contender(OURS_THREADS, i, r) for i in ("raw", "jpg", "folder") for r in two]
    found += [Contender(FFCV, images, "area", "uint8") for images in ("raw", "jpg")]
    found += [Contender(DATA_LOADER, "folder", r) for r in ("bilinear", "bicubic")]
    return found + [Contender(WEBDATASET, "tars", r) for r in ("bilinear", "bicubic")]


def _of_size_32() -> list[Contender]:
    found = []
    for resize in ("", "area", "bicubic"):
        found += [Contender(OURS, "raw", resize, gives, 32) for gives in ("float32", "uint8")]
        found += [Contender(OURS_THREADS, "raw", resize, "float32", 32)]
    found += [Contender(FFCV, "raw", resize, "uint8", 32) for resize in ("", "area")]
    return found + [
        Contender(DATA_LOADER, "arrays", resize, "float32", 32)
        for resize in ("", "bilinear", "bicubic")
    ]


CONTENDERS = {256: _of_size_256(), 32: _of_size_32()}


def open_loader(
    contender: Contender, path: Path, number: int, num_workers: int, batch_size: int
) -> Iterator[Any]:
    """Opens one endless iterator; several are told apart by `number`. All have a `close`."""
    opener = {DATA_LOADER: _torchvision, WEBDATASET: _webdataset, FFCV: _ffcv}
    return opener.get(contender.library, _ours)(contender, path, number, num_workers, batch_size)


def _ours(
    contender: Contender, path: Path, number: int, num_workers: int, batch_size: int
) -> Iterator[Any]:
    from data_ffcv import Augmentation, open_stream

    augmentation = Augmentation("pad_crop", contender.image_size, flip=True)
    if contender.resize:
        augmentation = Augmentation(
            "random_resized_crop",
            contender.image_size,
            flip=True,
            interpolation=contender.resize,
        )
    # Without a scaling a stream on the CPU hands out the bytes it would have normalised.
    as_bytes = mock.patch.multiple(
        "data_ffcv.streams.pipeline",
        to_scaling=lambda mean, std: None,
        move_scaling=lambda scaling, device: None,
    )
    with as_bytes if contender.gives == "uint8" else nullcontext():
        return open_stream(
            path,
            augmentation=augmentation,
            batch_size=batch_size,
            seed=0,
            name=f"stream {number}",
            mean=MEAN,
            std=STD,
            num_workers=num_workers,
            backend="threads" if contender.library == OURS_THREADS else "ffcv",
        )


def _ffcv(
    contender: Contender, path: Path, number: int, num_workers: int, batch_size: int
) -> Iterator[Any]:
    loader = build_ffcv_loader(contender, path, number, num_workers, batch_size, _MANY)
    return _endless(loader)


def build_ffcv_loader(
    contender: Contender,
    path: Path,
    number: int,
    num_workers: int,
    batch_size: int,
    num_samples: int = 0,
) -> Any:
    """Returns FFCV's loader; an epoch has all samples, or `num_samples` if those are more."""
    import numpy as np
    from ffcv.fields.basics import IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor, ToTorchImage

    from data_ffcv.beton.layout import read_layout

    num_in_file = read_layout(path).num_samples
    return Loader(
        str(path),
        batch_size=batch_size,
        num_workers=num_workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        seed=number,
        indices=np.resize(np.arange(num_in_file), max(num_in_file, num_samples)),
        pipelines={
            "image": [*_ffcv_operations(contender), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )


def _ffcv_operations(contender: Contender) -> list[Any]:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate

    if not contender.resize:
        return [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4)]
    size = (contender.image_size, contender.image_size)
    return [RandomResizedCropRGBImageDecoder(size, scale=(0.2, 1.0)), RandomHorizontalFlip()]


def _torchvision(
    contender: Contender, path: Path, number: int, num_workers: int, batch_size: int
) -> Iterator[Any]:
    from torch.utils.data import DataLoader, RandomSampler

    transform = _transform(contender)
    if contender.images == "folder":
        from torchvision.datasets import ImageFolder

        dataset: Any = ImageFolder(str(path), transform)
    else:
        dataset = _Arrays(path, transform)
    sampler = RandomSampler(dataset, replacement=True, num_samples=_MANY)
    loader = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, drop_last=True
    )
    return _endless(loader)


def _webdataset(
    contender: Contender, path: Path, number: int, num_workers: int, batch_size: int
) -> Iterator[Any]:
    import webdataset as wds

    transform = _transform(contender)
    tars = [str(tar) for tar in sorted(path.glob("*.tar"))]
    dataset = wds.WebDataset(tars, resampled=True, shardshuffle=False, seed=number)
    dataset = dataset.shuffle(500).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(transform, int).batched(batch_size, partial=False)
    return _endless(wds.WebLoader(dataset, batch_size=None, num_workers=num_workers))


def _transform(contender: Contender) -> Any:
    from data_ffcv.sources.torchvision_import import fix_torchvision_import

    fix_torchvision_import()
    from torchvision import transforms

    crop = transforms.RandomCrop(contender.image_size, padding=4)
    if contender.resize:
        crop = transforms.RandomResizedCrop(
            contender.image_size,
            scale=(0.2, 1.0),
            interpolation=transforms.InterpolationMode(contender.resize),
        )
    flip = transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class _Arrays:
    """Images in memory, as torchvision's CIFAR10 keeps and gives them."""

    def __init__(self, folder: Path, transform: Any) -> None:
        from _pictures import read_arrays

        self.pixels, self.labels = read_arrays(folder)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def _endless(loader: Any) -> Iterator[Any]:
    """Closing it closes the loader's iterator; FFCV's leaks its thread otherwise."""
    while True:
        batches = iter(loader)
        try:
            yield from batches
        finally:
            for end in ("close", "join"):
                getattr(batches, end, lambda: None)()
