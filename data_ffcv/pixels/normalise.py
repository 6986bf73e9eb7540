"""Normalisation in the decoding threads, for batches that stay on the CPU."""

from collections.abc import Callable

import numpy as np

from data_ffcv.pixels.compiling import compile_cached


def _make_normalise(source: int) -> Callable[..., None]:
    def normalise_pixels(
        images: np.ndarray, factor: np.ndarray, shift: np.ndarray, out: np.ndarray
    ) -> None:  # as below
        source  # noqa: B018  # see compile_cached
        count, num_pixels = images.shape[0], images.shape[1] * images.shape[2]
        values, target = images.reshape(count, 3 * num_pixels), out.reshape(count, 3, num_pixels)
        for n in range(count):
            for c in range(3):
                a, b = factor[c], shift[c]
                for i in range(num_pixels):
                    target[n, c, i] = np.float32(values[n, 3 * i + c]) * a + b

    return normalise_pixels


_normalise_pixels = compile_cached(_make_normalise, __file__)


def normalise_pixels(
    images: np.ndarray, factor: np.ndarray, shift: np.ndarray, out: np.ndarray
) -> None:
    """Writes images * factor + shift, rounded after the product and after the sum, as torch does.

    Args:
        images: uint8 [n, height, width, 3], contiguous.
        factor: float32 [3]; likewise `shift`.
        out: float32 [n, 3, height, width], contiguous, overwritten.
    """
    _normalise_pixels(images, factor, shift, out)
