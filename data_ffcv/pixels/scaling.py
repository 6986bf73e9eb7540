"""Normalisation of pixels by mean and deviation; in streams, one product and one sum for each."""

from collections.abc import Sequence

import numpy as np
import torch

# Factor and shift of each channel, float32 [3] both.
Scaling = tuple[np.ndarray, np.ndarray]
# The same on a device, float32 [3, 1, 1] both.
DeviceScaling = tuple[torch.Tensor, torch.Tensor]


def to_scaling(mean: Sequence[float], std: Sequence[float]) -> Scaling:
    """Returns what makes (pixel / 255 - mean) / std of bytes by one product and one sum."""
    means, deviations = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (255 * deviations)).astype(np.float32), (-means / deviations).astype(np.float32)


def move_scaling(scaling: Scaling, device: torch.device) -> DeviceScaling:
    """Returns a scaling for `normalise_tensor`, once: such a copy waits for the device."""
    factor, shift = (torch.from_numpy(part).to(device)[:, None, None] for part in scaling)
    return factor, shift


def normalise_tensor(pixels: torch.Tensor, scaling: DeviceScaling) -> torch.Tensor:
    """Normalises uint8 [n, height, width, 3] on its device into float32 [n, 3, height, width]."""
    factor, shift = scaling
    planes = pixels.permute(0, 3, 1, 2)
    values = planes.to(torch.float32, memory_format=torch.contiguous_format)
    return values.mul_(factor).add_(shift)


def normalise_images(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Returns uint8 [..., height, width, 3] as float32 [..., 3, height, width]: a copy."""
    means, deviations = (torch.tensor(values) for values in (mean, std))
    return ((torch.from_numpy(images.copy()) / 255 - means) / deviations).movedim(-1, -3)
