"""Pictures of masks: image, scores, what the encoder saw, and what the decoder made of it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlomae.models import MaskedAutoencoder
from mlomae.models.mae import Reconstruction

CELL = 112  # longer side of a shown image, pixels; small inputs are enlarged without smoothing
GAP = 4
LOW, MIDDLE, HIGH = (30, 30, 90), (190, 60, 110), (255, 225, 120)  # score colours, dark to bright


def mask_picture(
    model: MaskedAutoencoder,
    images: Tensor,
    out: Reconstruction,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """One row per image: the image, its scores, the visible patches, the reconstruction.

    Scores are coloured by their rank within the image, since only their order decides. Targets
    normalised per patch do not hold a patch's brightness, so the true mean and deviation of each
    patch are put back: the picture shows structure, and is kinder than the task.

    Args:
        model: gives the patch geometry; its weights are not used.
        images: [B, 3, height, width], normalised by mean and std.
        out: what the model's masked forward pass returned for them.

    Returns:
        uint8 [H, W, 3].
    """
    pixels = model.patchify(images.float())
    prediction = out["prediction"].float()
    if model.norm_pix_loss:
        variance, centre = torch.var_mean(pixels, dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + centre
    hidden = out["mask"][..., None].to(pixels.dtype)
    columns = [
        _to_bytes(images, mean, std),
        _score_map(model, out["scores"]),
        _to_bytes(model.unpatchify(pixels * (1 - hidden)), mean, std),
        _to_bytes(model.unpatchify(pixels * (1 - hidden) + prediction * hidden), mean, std),
    ]
    return _grid(columns)


def _to_bytes(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[B, 3, height, width] normalised -> uint8 [B, height, width, 3]."""
    scale, shift = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (std, mean))
    pixels = (images.float() * scale + shift).clamp(0, 1) * 255
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _score_map(model: MaskedAutoencoder, scores: Tensor) -> np.ndarray:
    """Scores [B, N] -> uint8 [B, height, width, 3], coloured by rank within the image."""
    order = scores.argsort(dim=1, stable=True)  # as the model breaks ties
    ranks = order.argsort(dim=1).float() / (scores.shape[1] - 1)
    stops = torch.tensor([LOW, MIDDLE, HIGH], dtype=torch.float32, device=ranks.device)
    position = ranks * (len(stops) - 1)
    below = position.long().clamp(max=len(stops) - 2)
    colours = torch.lerp(stops[below], stops[below + 1], (position - below)[..., None])
    patches = colours[:, :, None].expand(-1, -1, model.patch_size**2, -1).flatten(2)
    return model.unpatchify(patches).byte().permute(0, 2, 3, 1).cpu().numpy()


def _grid(columns: list[np.ndarray]) -> np.ndarray:
    """Columns of uint8 [B, height, width, 3] -> one picture, with white gaps."""
    factor = max(1, CELL // max(columns[0].shape[1:3]))
    enlarged = [c.repeat(factor, axis=1).repeat(factor, axis=2) for c in columns]
    rows, height, width = enlarged[0].shape[:3]
    shape = (rows * (height + GAP) + GAP, len(columns) * (width + GAP) + GAP, 3)
    canvas = np.full(shape, 255, np.uint8)
    for x, column in enumerate(enlarged):
        for y, image in enumerate(column):
            top, left = GAP + y * (height + GAP), GAP + x * (width + GAP)
            canvas[top : top + height, left : left + width] = image
    return canvas
