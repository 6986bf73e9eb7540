"""The settings that every loader has, and the backend that they choose."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "ffcv", "threads")
Backend = Literal["auto", "ffcv", "threads"]


@dataclass(frozen=True)
class LoaderSettings:
    """How the images of one rank become batches.

    Attributes:
        views: What is done to each image, once for each view.
        batch_size: Images per batch and rank.
        seed: 64 bits that decide crops, flips, colours and erased rectangles.
        mean: Channel means that are subtracted, for pixels in [0, 1].
        std: Channel deviations that are divided by.
        num_workers: Decoding threads, at most the cores this process may use.
        backend: As it was asked for; see `choose_backend`.
        device: Where the tensors go.

    Raises:
        DataError: a value is out of range.
    """

    views: tuple[Augmentation, ...]
    batch_size: int
    seed: int
    mean: Sequence[float]
    std: Sequence[float]
    num_workers: int
    backend: Backend
    device: str | torch.device

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be positive, got {self.batch_size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(
                f"mean and std need three channels, std > 0; got {self.mean} and {self.std}"
            )
        if not self.views:
            raise DataError("augmentation must be one, or one for each view; got none")

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a colour, each 0 to 255: what lies outside of an image is painted with."""
        red, green, blue = (min(max(round(255 * mean), 0), 255) for mean in self.mean)
        return red, green, blue


def to_views(augmentation: Augmentation | Sequence[Augmentation]) -> tuple[Augmentation, ...]:
    """Returns one augmentation as the only view, several as one view each."""
    return (augmentation,) if isinstance(augmentation, Augmentation) else tuple(augmentation)


def choose_backend(backend: Backend, path: Path) -> Literal["ffcv", "threads"]:
    """Returns the backend that reads `path`; warns once where FFCV would, but is not installed.

    Raises:
        DataError: the wanted backend does not exist, is not installed or cannot read `path`.
    """
    if backend not in BACKENDS:
        raise DataError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "threads" or (backend == "auto" and path.is_dir()):
        return "threads"
    if path.is_dir():
        raise DataError(
            f"{path} is a folder, which backend ffcv cannot read; convert it with "
            "python -m data_ffcv.convert imagefolder, or use backend auto or threads"
        )
    reason = ffcv_problem()
    if reason is None:
        return "ffcv"
    if backend == "ffcv":
        raise DataError(
            f"FFCV cannot be used ({reason}); install it (pip install ffcv), or use backend auto "
            "or threads"
        )
    _warn_no_ffcv(reason)
    return "threads"


@cache
def ffcv_problem() -> str | None:
    """Returns why FFCV cannot be imported, None where it can."""
    if importlib.util.find_spec("ffcv") is None:
        return "it is not installed"
    try:
        import data_ffcv.streams.ffcv_backend  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # such as a library it was built with
        return " ".join(str(error).split())
    return None


@cache
def _warn_no_ffcv(reason: str) -> None:
    logger.warning(
        "FFCV cannot be used (%s): .beton files are read by threads, batches are the same", reason
    )
