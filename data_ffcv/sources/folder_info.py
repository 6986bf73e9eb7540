"""A folder of class folders, read as it is instead of being converted."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from data_ffcv.beton.info import BetonInfo, file_version, inspect_beton, side_path
from data_ffcv.errors import DataError
from data_ffcv.sources import open_source, read_size
from data_ffcv.splits import conversion_order

_NUM_TOGETHER = 256  # files that a thread takes at once


class FolderInfo:
    """What a folder of class folders holds; the counterpart of `BetonInfo`.

    Samples are numbered as the converter would write them with its default seed, so that a stream
    over the folder and one over the file that was made from it give the same samples.

    Attributes:
        path: The folder.
        num_samples: Number of images.
        num_classes: Number of classes; labels are in [0, num_classes).
        classes: Names of the class folders, sorted.
        labels: Class of each sample, int64 [num_samples].
    """

    has_masks = False

    def __init__(self, path: Path) -> None:
        """Lists the folder; raises DataError when it is not one of class folders."""
        self.path = path
        self._source = open_source("imagefolder", path)
        self._order = conversion_order(len(self._source))
        self.num_samples = len(self._order)
        self.classes = self._source.classes
        self.num_classes = len(self.classes)
        labels = self._source.labels
        assert labels is not None  # of an ImageFolder
        self.labels = labels[self._order]

    def read(self, index: int) -> np.ndarray:
        """Returns one image, uint8 [height, width, 3].

        Raises:
            DataError: it cannot be read.
        """
        number = int(self._order[index])
        with self._naming(number):
            return np.asarray(self._source.read(number).image)

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Turns whatever an image raises into a DataError that names it."""
        try:
            yield
        except Exception as error:
            raise DataError(
                f"{self._source.name(number)} cannot be read ({error}); fix or remove it"
            ) from error

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Height and width of every image, int64 [num_samples, 2], from the files' headers."""
        starts = range(0, self.num_samples, _NUM_TOGETHER)
        with ThreadPoolExecutor(4) as pool:
            return np.concatenate(list(pool.map(self._read_sizes, starts)))

    def _read_sizes(self, start: int) -> np.ndarray:
        sizes = []
        for number in range(start, min(start + _NUM_TOGETHER, self.num_samples)):
            with self._naming(number):
                sizes.append(read_size(self._source.name(number)))
        return np.array(sizes)

    @property
    def min_height(self) -> int:
        """Smallest image height, in pixels; the first question opens all files."""
        return int(self._sizes[:, 0].min())

    @property
    def max_height(self) -> int:
        """Largest image height, in pixels."""
        return int(self._sizes[:, 0].max())

    @property
    def min_width(self) -> int:
        """Smallest image width, in pixels."""
        return int(self._sizes[:, 1].min())

    @property
    def max_width(self) -> int:
        """Largest image width, in pixels."""
        return int(self._sizes[:, 1].max())


ImagesInfo = BetonInfo | FolderInfo


# What is in use now: streams of one unchanged file share its tables, those of a folder its list.
_in_use: WeakValueDictionary[tuple[object, ...], ImagesInfo] = WeakValueDictionary()


def inspect_images(path: str | Path) -> ImagesInfo:
    """Checks a ``.beton`` file, or lists a folder of class folders, and describes it.

    Raises:
        DataError: it is missing, damaged or of another kind.
    """
    path = Path(path)
    is_folder = os.path.isdir(path)
    # Another spelling of the path is another entry: errors name the caller's.
    key = (path, path.absolute(), *(_folder_versions(path) if is_folder else _versions(path)))
    info = _in_use.get(key)
    if info is None:
        info = FolderInfo(path) if is_folder else inspect_beton(path)
        _in_use[key] = info
    return info


def _versions(path: Path) -> list[tuple[int, ...] | None]:
    files = (path, side_path(path))
    return [file_version(file.stat()) if os.path.isfile(file) else None for file in files]


def _folder_versions(path: Path) -> list[tuple[str | int, ...]]:
    """Tells when a class folder, or something directly in one, has come or gone."""
    with os.scandir(path) as entries:
        return sorted((e.name, *file_version(e.stat())) for e in entries if e.is_dir())
