"""What a level's loss is: a function of the levels' models and a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Models = Mapping[str, Any]
"""The callable models that a loss may use, by the name of their level."""

Settings = Sequence[Mapping[str, Any]]
"""`lr` and `weight_decay`, or one of them, for each parameter group of an optimizer."""


@dataclass(eq=False)
class WeightedLoss:
    """A loss sum_i weight_i * loss_i whose two factors keep the levels apart.

    The level's own weights enter only through the losses, the levels above only through the
    weights. The mixed product then needs one table of numbers from the level's own model; what the
    weights were computed from is kept from the step itself, so that a finite difference cannot
    move it.

    Attributes:
        losses: `(models, batch, frozen=None) -> (losses, frozen)`: losses of any shape, and what
            the weights, or a choice within the losses, depend on. Given `frozen`, it is used. It
            counts as constant: what it owes to the level's own weights is left out.
        weights: `(models, frozen) -> weights`, of the losses' shape.
    """

    losses: Callable[..., tuple[Tensor, Any]]
    weights: Callable[[Models, Any], Tensor]

    def __call__(self, models: Models, batch: Any) -> Tensor:
        losses, frozen = self.losses(models, batch)
        return (self.weights(models, frozen) * losses).sum()


@dataclass(eq=False)
class ReplayedLoss:
    """A loss that makes a choice, such as top-k, which every derivative of its step repeats.

    Attributes:
        loss: `(models, batch, choice=None) -> (loss, choice)`. Given `choice`, it is used in place
            of a new one. It counts as constant.
    """

    loss: Callable[..., tuple[Tensor, Any]]

    def __call__(self, models: Models, batch: Any) -> Tensor:
        return self.loss(models, batch)[0]


class CalledModels(dict[str, Any]):
    """Models by level name, with an error that says how to reach a missing one.

    Args:
        name: of the level whose loss uses them.
        named: the levels that it names in `lower` and `upper`.
        used: gets the names of those that are used.
    """

    def __init__(self, models: Models, name: str, named: Sequence[str], used: set[str]) -> None:
        super().__init__(models)
        self._level, self._named, self._used = name, named, used

    def __getitem__(self, name: str) -> Any:
        self._used.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Any:
        level = self._level
        if name in self._named:
            raise ValueError(
                f"the loss of level {level} uses models[{name!r}], but level {level} is in no "
                f"problem; put it and level {name} into a Multilevel, and keep that"
            )
        raise ValueError(
            f"the loss of level {level} uses models[{name!r}]; name that level in its lower or "
            "upper"
        )


Loss = Callable[[Models, Any], Tensor] | WeightedLoss | ReplayedLoss
