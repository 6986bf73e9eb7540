"""The networks of MLO-MAE: masked autoencoder, masking networks, heads.

Importing this package adds the autoencoders to timm's registry, `mae_vit_base_patch16` and so on.
"""

from mlomae.models.classifier import ClassificationHead, SegmentationHead
from mlomae.models.mae import MaskedAutoencoder, Masks, choose_masks, reconstruction_loss
from mlomae.models.masking import (
    LightMaskingNetwork,
    MaskingNetwork,
    Scorer,
    block_scores,
    gumbel_keys,
    random_scores,
)
from mlomae.models.registry import PRESETS

__all__ = [
    "PRESETS",
    "ClassificationHead",
    "LightMaskingNetwork",
    "MaskedAutoencoder",
    "MaskingNetwork",
    "Masks",
    "Scorer",
    "SegmentationHead",
    "block_scores",
    "choose_masks",
    "gumbel_keys",
    "random_scores",
    "reconstruction_loss",
]
