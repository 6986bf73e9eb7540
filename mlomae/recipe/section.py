"""What the sections of a recipe share: strictness, refusals, the types of their values."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt


class Refusal(ValueError):
    """A broken rule between keys, as a sentence `key problem`; the loader adds file and section."""

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key} {problem}")


def nearest(name: str, valid: list[str]) -> str:
    """Return the entry of `valid` most like `name`."""
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; an empty section is a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Section(BaseModel):
    """What all sections share."""

    # strict: `image_size: true` or `epochs: "4"` is a slip, not a number
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


# YAML knows no tuples and no paths, so these two accept what stands for them
FilePath = Annotated[Path, Field(strict=False)]
# one stands for a list of one
_Listed = BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)
FilePaths = Annotated[tuple[FilePath, ...], _Listed, Field(strict=False)]
Names = Annotated[tuple[str, ...], _Listed, Field(strict=False)]

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]  # neither nothing nor everything
BelowOne = Annotated[float, Field(ge=0, lt=1)]  # what is lost, or kept of the past: 1 is too much
UpToOne = Annotated[float, Field(gt=0, le=1)]  # a factor of which 1 is off
Betas = Annotated[tuple[BelowOne, BelowOne], Field(strict=False)]
NumClasses = Annotated[int, Field(ge=2)]
# one number stands for a square
Sides = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(lambda v: (v, v) if type(v) is int else v),
    Field(strict=False),
]
