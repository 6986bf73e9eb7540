"""The three networks of MLO-MAE: masked autoencoder, masking network, classification head."""

from mlomae.models.classifier import ClassificationHead
from mlomae.models.mae import (
    MaskedAutoencoder,
    Scorer,
    random_scores,
    reconstruction_loss,
)
from mlomae.models.masking import MaskingNetwork

__all__ = [
    "ClassificationHead",
    "MaskedAutoencoder",
    "MaskingNetwork",
    "Scorer",
    "random_scores",
    "reconstruction_loss",
]
