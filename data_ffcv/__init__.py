"""Image data for training: conversion to ``.beton``, splits, seeded augmentation, loading.

| where | what |
| --- | --- |
| ``convert.py``, ``inspect.py`` | the commands ``python -m data_ffcv.convert`` and ``.inspect`` |
| ``sources/`` | reading collections as they were published, one sample at a time |
| ``conversion/`` | writing them as ``.beton`` files |
| ``beton/`` | the file format, what a file holds (`inspect_beton`), verification |
| ``pixels/`` | `Augmentation`, the decoder that applies it, and its compiled kernels |
| ``streams/`` | batches: `open_stream`, `open_eval_loader`, `WholeImages`; the two backends |
| ``splits.py`` | `split_by_class`, `shard_indices` |
| ``errors.py`` | `DataError` |

Importing this package imports neither FFCV nor numba; both are loaded when the first stream
is opened.
"""

from data_ffcv.beton.info import BetonInfo, inspect_beton
from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation
from data_ffcv.pixels.scaling import normalise_images
from data_ffcv.sources.folder_info import FolderInfo, ImagesInfo, inspect_images
from data_ffcv.splits import shard_indices, split_by_class
from data_ffcv.streams.loader import EvalLoader, Stream, open_eval_loader, open_stream
from data_ffcv.streams.settings import choose_backend
from data_ffcv.streams.whole import WholeImages

__all__ = [
    "Augmentation",
    "BetonInfo",
    "DataError",
    "EvalLoader",
    "FolderInfo",
    "ImagesInfo",
    "Stream",
    "WholeImages",
    "choose_backend",
    "inspect_beton",
    "inspect_images",
    "normalise_images",
    "open_eval_loader",
    "open_stream",
    "shard_indices",
    "split_by_class",
]
