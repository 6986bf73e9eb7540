"""Imported once by the server that forks ranks: everything that a start of a rank waits for.

It imports what a pretraining imports, also where that is done late, and loads the compiled kernels
of the loader. It leaves no thread behind, for a fork would take none along, and no process group.
"""

import gc
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import mlomae  # noqa: F401 - fixes what timm's import of torchvision trips over
from data_ffcv import Augmentation, open_stream
from data_ffcv.convert import convert
from mlomae.pretraining import program as train  # noqa: F401


def _load_kernels(folder: Path) -> None:
    for label in "ab":
        (folder / "png" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(folder / "png" / label / "0.png")
    convert("imagefolder", folder / "png", folder / "two.beton", num_workers=1)
    with open_stream(
        folder / "two.beton",
        augmentation=Augmentation(kind="random_resized_crop", image_size=8),
        batch_size=2,
        seed=0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ) as stream:
        next(stream)


with tempfile.TemporaryDirectory() as scratch:
    _load_kernels(Path(scratch))
deadline = time.monotonic() + 30
while len(os.listdir("/proc/self/task")) != 1:  # a thread that was joined leaves a moment later
    if time.monotonic() > deadline:
        raise RuntimeError("a thread is left: ranks cannot be forked from here")
    time.sleep(0.01)
gc.collect()
gc.freeze()  # DeepSpeed collects garbage in its initialisation: it need not look at all of this
