"""Normalisation on the CPU: one table look-up for each value, in the threads that decode."""

import numpy as np
import torch
from numba import njit


@njit(nogil=True, cache=True)
def look_up(images: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes out[n, c, y, x] = table[c, images[n, y, x, c]].

    Args:
        images: uint8 [n, height, width, 3].
        table: float32 [3, 256].
        out: float32 [n, 3, height, width], overwritten.
    """
    count, height, width, _ = images.shape
    for n in range(count):
        for c in range(3):
            for y in range(height):
                for x in range(width):
                    out[n, c, y, x] = table[c, images[n, y, x, c]]


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Returns (pixels / 255 - mean) / std as float32 [..., 3, height, width].

    Args:
        pixels: uint8 [..., 3, height, width].
        mean: float32 [3], of pixels in [0, 1], on the same device; likewise `std`.
    """
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_(255 * mean[:, None, None]).div_(255 * std[:, None, None])


def normalisation_table(mean: torch.Tensor, std: torch.Tensor) -> np.ndarray:
    """Returns what `normalise` makes of 0 ... 255 in each channel, float32 [3, 256]."""
    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalise(values, mean, std)[:, 0].numpy()
