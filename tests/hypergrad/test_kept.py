"""What a step computes below and keeps for the hypergradient."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import (
    Identity,
    Level,
    Multilevel,
    Neumann,
    ReplayedLoss,
    Unrolled,
    WeightedLoss,
)
from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    hypergradient,
    relative_error,
)
from tests.hypergrad.problems import LevelSpec, Models, Problem, chain3, problem_of
from tests.hypergrad.test_multilevel_use import levels_of, stream


def network(num_outputs: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, num_outputs))


def reweighted(models: Models, x: Tensor) -> Tensor:
    return (models["a"](x).square() * models["theta"](x).exp()).mean()


def without_gradient(models: Models, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = models["a"](x)
    return models["h"](features)


def frozen_losses(models: Models, x: Tensor, frozen: Any = None) -> tuple[Tensor, Any]:
    """What is frozen takes a call that is not made again."""
    frozen = models["a"](x.flip(-1)).detach() if frozen is None else frozen
    return (models["h"](models["a"](x)) - x).square().mean(-1), frozen


def replayed_loss(models: Models, x: Tensor, choice: Any = None) -> tuple[Tensor, Any]:
    """The same of a choice, whose losses and weights are one."""
    losses, choice = frozen_losses(models, x, choice)
    return (models["theta"](choice).squeeze(-1) * losses).sum(), choice


LOSSES: dict[str, Any] = {
    "once": lambda m, x: m["h"](m["a"](x)),
    "twice": lambda m, x: m["h"](m["a"](x) * m["a"](x.flip(0))),
    "of its own": lambda m, x: m["a"](m["h"](x)),
    "of itself": lambda m, x: m["h"](m["a"](m["a"](x))),
    "of another": lambda m, x: m["h"](m["b"](m["a"](x).tanh())),
    "without gradient": without_gradient,
    "written into": lambda m, x: m["h"](m["a"](x).add_(1).relu_()),
    "detached": lambda m, x: m["h"](m["a"](x).detach()) + m["a"](x),
}  # fmt: skip


def problem(call: Any) -> Problem:
    torch.manual_seed(0)

    def top(models: Models, x: Tensor) -> Tensor:
        return models["h"](models["b"](models["a"](x))).square().mean()

    def loss(models: Models, x: Tensor) -> Tensor:
        return (call(models, x) - x).square().mean()

    def of_a(models: Models, x: Tensor) -> Tensor:
        return (models["b"](models["a"](x)) - x).square().mean()

    is_whole = isinstance(call, WeightedLoss | ReplayedLoss)
    last, upper = (call, ("theta",)) if is_whole else (loss, ())
    return problem_of(
        torch.float64,
        LevelSpec("a", network(), reweighted, upper=("theta",)),
        LevelSpec("b", network(), of_a, lower=("a",)),
        LevelSpec("h", network(), last, lower=("a", "b"), upper=upper),
        LevelSpec("theta", network(1), top, lower=("a", "b", "h")),
    )


def error(specs: Problem, keep_activations: bool) -> float:
    generator = torch.Generator().manual_seed(1)
    levels, references = levels_of(specs), []
    multilevel = Multilevel(levels, keep_activations=keep_activations)
    for warm in (True, True, False):
        for level, spec in zip(levels, specs.levels, strict=True):
            x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            rules = OptimizerRules.of(level.optimizer, level.model)
            if not warm:
                references.append(ReferenceLevel(level.name, level.model, spec.loss, [[x]], rules))
            if spec is not specs.target:
                level.step(x)
        if warm:
            multilevel.clear()
    result = multilevel.hypergradient("theta", x)
    return relative_error(levels[-1].named(result.vector), hypergradient(references, "theta"))


@pytest.mark.parametrize("keep_activations", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_calls_of_models_below(name: str, keep_activations: bool) -> None:
    assert error(problem(LOSSES[name]), keep_activations) <= 1e-10


@pytest.mark.parametrize("keep_activations", [True, False])
def test_calls_that_a_frozen_loss_leaves_out(keep_activations: bool) -> None:
    loss = WeightedLoss(frozen_losses, lambda models, frozen: models["theta"](frozen).squeeze(-1))
    specs = problem(loss)
    assert error(specs, keep_activations) <= 1e-10


@pytest.mark.parametrize("keep_activations", [True, False])
def test_calls_that_a_replayed_loss_leaves_out(keep_activations: bool) -> None:
    assert error(problem(ReplayedLoss(replayed_loss)), keep_activations) <= 1e-10


@pytest.mark.parametrize("estimator", [Unrolled(), Identity(), Neumann(1, 0.1)], ids=str)
def test_a_cycle_keeps_nothing(estimator: Any) -> None:
    specs, batches = chain3(), []
    multilevel = Multilevel(levels_of(specs), estimator=estimator)

    def noted(seed: int) -> Iterator[Any]:
        for batch in stream(specs, seed):
            batches.append(weakref.ref(batch[0]))
            yield batch

    multilevel.cycle({name: (b for b in noted(i)) for i, name in enumerate(multilevel.levels)})
    gc.collect()
    assert batches and not any(batch() is not None for batch in batches)


def test_a_discarded_step_keeps_nothing() -> None:
    specs = chain3()
    w, head, theta = levels_of(specs)
    multilevel = Multilevel([w, head, theta])
    batch = next(stream(specs, 0))
    alive = weakref.ref(batch[0])
    head.backward(batch)
    head.discard()
    del batch
    multilevel.clear()
    gc.collect()
    assert alive() is None


def test_only_upper_levels_have_hypergradients() -> None:
    specs = chain3()
    multilevel = Multilevel(levels_of(specs))
    for name in ("w", "nobody"):
        with pytest.raises(ValueError, match=f"'{name}' is no upper level; there are theta"):
            multilevel.hypergradient(name, next(stream(specs, 0)))
    with pytest.raises(ValueError, match="level theta needs at least one micro-batch"):
        multilevel.hypergradient("theta")


def test_a_rate_that_is_a_tensor() -> None:
    """Schedules fill it anew, but a step was taken with what it held."""

    def vector(kind: Any) -> Tensor:
        specs = chain3()
        levels = []
        for spec in specs.levels:
            optimizer = torch.optim.AdamW(spec.module.parameters(), lr=kind(0.01))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            level = Level(
                spec.name, spec.module, optimizer, loss=spec.loss, scheduler=scheduler,
                lower=spec.lower, upper=spec.upper,
            )  # fmt: skip
            levels.append(level)
        multilevel, batches = Multilevel(levels), stream(specs, 0)
        for level in levels[:-1]:
            level.step(next(batches))
        return torch.cat(multilevel.hypergradient("theta", next(batches)).vector)

    as_tensor = vector(lambda rate: torch.tensor(rate, dtype=torch.float64))
    torch.testing.assert_close(as_tensor, vector(float), rtol=1e-8, atol=1e-14)
