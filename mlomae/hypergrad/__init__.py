"""Hypergradients through real optimizer steps, on plain modules and on DeepSpeed engines.

A `Level` wraps a module with its optimizer, or a DeepSpeed engine at any ZeRO stage. It records an
optimizer step, pulls a loss of a level above back onto its own weights, turns that into the
cotangent of the step's gradient, and runs the tangent pass which yields the mixed products.

This package imports nothing of the rest of the project: it knows no image and no mask.
"""

from mlomae.hypergrad.adjoints import adamw_cotangent, clipping_cotangent, sgd_cotangent
from mlomae.hypergrad.level import Level, StepRecord
from mlomae.hypergrad.partition import Vector

__all__ = [
    "Level",
    "StepRecord",
    "Vector",
    "adamw_cotangent",
    "clipping_cotangent",
    "sgd_cotangent",
]
