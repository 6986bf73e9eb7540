"""Images per second of the two converters, each in its process; opening the source counts."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from _loaders import FFCV
from _pictures import JPEG_QUALITY, read_arrays

FORMATS = {"folder": "imagefolder", "arrays": "cifar10"}


def convert_by_ours(form: str, source: Path, out: Path, mode: str, num_workers: int) -> float:
    from data_ffcv.convert import convert

    start = time.perf_counter()
    info = convert(FORMATS[form], source, out, write_mode=mode, num_workers=num_workers)
    return _rate(out, info.num_samples, start)


def convert_by_ffcv(form: str, source: Path, out: Path, mode: str, num_workers: int) -> float:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    from data_ffcv.sources.torchvision_import import fix_torchvision_import

    fix_torchvision_import()
    from torchvision.datasets import ImageFolder

    start = time.perf_counter()
    images: Any = ImageFolder(str(source)) if form == "folder" else _Arrays(source)
    fields = {
        "image": RGBImageField(write_mode=mode, jpeg_quality=JPEG_QUALITY),
        "label": IntField(),
    }
    writer = DatasetWriter(str(out), fields, num_workers=num_workers)
    writer.from_indexed_dataset(images, shuffle_indices=True)
    return _rate(out, len(images), start)


CONVERTERS = {"ours": convert_by_ours, FFCV: convert_by_ffcv}


def _rate(out: Path, num_images: int, start: float) -> float:
    seconds = time.perf_counter() - start
    out.unlink()
    Path(f"{out}.json").unlink(missing_ok=True)
    return num_images / seconds


class _Arrays:
    def __init__(self, source: Path) -> None:
        self.pixels, self.labels = read_arrays(source)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], int(self.labels[index])
