"""Pretrained weights: their files, their names, and filling our model with them."""

from mlomae.foreign.load import Loaded, check_weights, load_weights
from mlomae.foreign.read import PretrainedWeights, infer_architecture, read_weights

__all__ = [
    "Loaded",
    "PretrainedWeights",
    "check_weights",
    "infer_architecture",
    "load_weights",
    "read_weights",
]
