"""Hypergradients of multilevel problems, on plain modules and on DeepSpeed engines.

Declare each `Level` (a model with its optimizer, its loss, and the levels that the loss reads), put
them into a `Multilevel` problem with an estimator, and call `cycle` or `hypergradient`:

    train = Level("train", model, optimizer, loss=train_loss, upper=["weighter"])
    weighter = Level("weighter", net, net_optimizer, loss=validation_loss, lower=["train"])
    problem = Multilevel([train, weighter], estimator=Unrolled(steps=1))

This package imports nothing of the rest of the project: it knows no image and no mask.
"""

from mlomae.hypergrad.estimators import (
    ConjugateGradient,
    Estimator,
    FiniteDifference,
    Identity,
    Neumann,
    Sama,
    Truncated,
    Unrolled,
)
from mlomae.hypergrad.level import Binding, Level
from mlomae.hypergrad.losses import ReplayedLoss, WeightedLoss
from mlomae.hypergrad.multilevel import Multilevel
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.records import Hypergradient
from mlomae.hypergrad.steps import newest

__all__ = [
    "Binding",
    "ConjugateGradient",
    "Estimator",
    "FiniteDifference",
    "Hypergradient",
    "Identity",
    "Level",
    "Multilevel",
    "Neumann",
    "ReplayedLoss",
    "Sama",
    "Truncated",
    "Unrolled",
    "Vector",
    "WeightedLoss",
    "newest",
]
