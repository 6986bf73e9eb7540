"""Finite differences of every estimator, what each costs, what is kept, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import (
    ConjugateGradient,
    FiniteDifference,
    Identity,
    Neumann,
    ReplayedLoss,
    Sama,
    Truncated,
    Unrolled,
    WeightedLoss,
)
from mlomae.hypergrad.randomness import RandomState
from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    Weights,
    hypergradient,
    relative_error,
)
from tests.hypergrad.problems import (
    NUM_INPUTS,
    WIDTH,
    Backbone,
    Batch,
    Head,
    LevelSpec,
    Models,
    Problem,
    Rates,
    Weighter,
    chain2,
    chain3,
    head_loss,
    problem_of,
    reconstruction_loss,
    sample_losses,
    sample_weights,
    top_loss,
    weighted_loss,
)
from tests.hypergrad.test_estimators import DAMPED, ESTIMATORS, Trained
from tests.hypergrad.test_multilevel import Run
from tests.hypergrad.test_multilevel_use import assert_close, snapshot

Shift = partial(FiniteDifference, relative_step=1e-4)


def error_between(problem: Callable[[], Problem], mine: Any, exact: Any, **options: Any) -> float:
    """Of two estimators on the same trained problem."""
    values = [Trained(problem(), each, **options).hypergradient() for each in (mine, exact)]
    return relative_error(*values)


# --- finite differences ----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_differences_converge_as_the_square_of_the_step(estimator: Any) -> None:
    def vector(estimator: Any) -> Weights:
        return Trained(chain3(dropout=0.3), estimator, num_steps=3, num_micro=2).hypergradient()

    exact = vector(estimator)
    errors = {
        step: relative_error(vector(Shift(estimator, relative_step=step)), exact)
        for step in (4e-3, 1e-3, 1e-5)
    }
    assert errors[4e-3] / errors[1e-3] == pytest.approx(16, rel=0.1)
    assert errors[1e-3] <= 1e-3 and errors[1e-5] <= 1e-7


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_differences_in_float32(estimator: Any) -> None:
    problem = partial(chain3, torch.float32, dropout=0.3)
    mine = Shift(estimator, relative_step=1e-3)
    assert error_between(problem, mine, estimator, num_steps=3) <= 1e-2


def test_both_sides_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained(chain3(dropout=0.3), Shift(Unrolled(2)), num_steps=2)
    before, value = snapshot([*run.levels.values()]), run.hypergradient()
    for old, new in zip(before, snapshot([*run.levels.values()]), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    assert_close(run.hypergradient(), value)
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    assert relative_error(run.hypergradient(), value) > 10


def test_a_radius_is_an_absolute_distance() -> None:
    run = Trained(chain2(), FiniteDifference(Unrolled(), radius=0.05))
    partition = run.levels["train"].partition
    (record,) = run.levels["train"].records
    relative = 0.05 / partition.dot(record.weights, record.weights) ** 0.5
    same = Trained(chain2(), FiniteDifference(Unrolled(), relative_step=relative))
    assert_close(run.hypergradient(), same.hypergradient())


def chosen_losses(models: Models, batch: Batch, frozen: Any = None) -> tuple[Tensor, Any]:
    """Errors of the two tokens whose features have the highest scores."""
    features, outputs = models["w"](batch[0])
    if frozen is None:
        frozen = features.detach(), models["theta"](features.detach()).topk(2).indices
    return (outputs - batch[0]).square().mean(-1).gather(-1, frozen[1]), frozen


def chosen_weights(models: Models, frozen: Any) -> Tensor:
    return models["theta"](frozen[0]).gather(-1, frozen[1])


def choosing(loss: Any) -> Problem:
    torch.manual_seed(0)
    return problem_of(
        torch.float64,
        LevelSpec("w", Backbone(NUM_INPUTS), loss, upper=("theta",)),
        LevelSpec("head", Head(), head_loss("head"), lower=("w",)),
        LevelSpec("theta", Weighter(WIDTH), top_loss("head"), lower=("w", "head")),
    )


def test_what_a_weighted_loss_freezes_does_not_switch() -> None:
    weighted = WeightedLoss(chosen_losses, chosen_weights)
    frozen, switching = partial(choosing, weighted), partial(choosing, weighted.__call__)
    wide = Shift(Unrolled(2), relative_step=1e-2)
    exact = Trained(switching(), Unrolled(2), num_steps=2).hypergradient()
    assert_close(Trained(frozen(), Unrolled(2), num_steps=2).hypergradient(), exact)
    assert error_between(frozen, wide, Unrolled(2), num_steps=2) <= 1e-2
    assert error_between(switching, wide, Unrolled(2), num_steps=2) >= 1


def test_what_a_replayed_loss_chose_does_not_switch() -> None:
    def loss(models: Models, batch: Batch, choice: Any = None) -> tuple[Tensor, Any]:
        """Unlike in a weighted loss, the choice alone is kept: weights follow the features."""
        features, outputs = models["w"](batch[0])
        if choice is None:
            choice = models["theta"](features.detach()).topk(2).indices
        losses = (outputs - batch[0]).square().mean(-1).gather(-1, choice)
        return (models["theta"](features).gather(-1, choice) * losses).sum(), choice

    replayed = partial(choosing, ReplayedLoss(loss))
    switching = partial(choosing, lambda models, batch: loss(models, batch)[0])
    wide = Shift(Unrolled(2), relative_step=1e-2)
    exact = Trained(switching(), Unrolled(2), num_steps=2).hypergradient()
    assert_close(Trained(replayed(), Unrolled(2), num_steps=2).hypergradient(), exact)
    assert error_between(replayed, wide, Unrolled(2), num_steps=2) <= 1e-2
    assert error_between(switching, wide, Unrolled(2), num_steps=2) >= 1


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_weighted_loss_whose_weights_draw(num_steps: int) -> None:
    def problem(loss: Any) -> Problem:
        train, weighter = chain2(dropout=0.3).levels
        module = nn.Sequential(weighter.module, nn.Dropout(0.5))
        return Problem((replace(train, loss=loss), replace(weighter, module=module)), torch.float64)

    options = {"num_steps": num_steps, "num_micro": 2}
    weighted = WeightedLoss(sample_losses, sample_weights)
    estimator = Unrolled(num_steps)
    exact = Trained(problem(weighted_loss), estimator, **options).hypergradient()
    assert_close(Trained(problem(weighted), estimator, **options).hypergradient(), exact)
    value = Trained(problem(weighted), Shift(estimator), **options).hypergradient()
    assert relative_error(value, exact) <= 1e-5


# --- costs -----------------------------------------------------------------------------------

PASSES = [
    (Unrolled(1), 1), (Unrolled(2), 2), (Truncated(2), 2), (Identity(), 1), (Sama(), 1),
    (Neumann(3, 0.1), 4), (ConjugateGradient(3, 0.0, damping=9.0), 4),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["tangents", "differences"])
@pytest.mark.parametrize(("estimator", "passes"), PASSES, ids=str)
def test_forward_passes(estimator: Any, passes: int, kind: str) -> None:
    if kind == "differences":
        estimator, passes = Shift(estimator), 2 * passes
    for num_micro in (1, 2):
        options = {"num_steps": 2, "num_micro": num_micro, "keep_activations": False}
        run = Trained(chain3(), estimator, **options)
        run.hypergradient()
        # Each once at the top; what the head's passes call of w is not w's own.
        assert run.calls["head"] == (1 + passes) * num_micro
        assert run.calls["w"] == (1 + passes + passes) * num_micro


@pytest.mark.parametrize(
    ("estimator", "passes"), [(Identity(), 1), (Shift(Identity()), 2)], ids=str
)
def test_nothing_is_recorded_of_a_weighted_loss(estimator: Any, passes: int) -> None:
    problem = choosing(WeightedLoss(chosen_losses, chosen_weights))
    run = Trained(problem, estimator, keep_activations=False)
    recorded: list[bool] = []
    root = run.levels["w"].twin.root
    root.register_forward_hook(lambda _, __, out: recorded.append(out[1].requires_grad))
    run.hypergradient()
    # The upper level's loss and the head's passes differentiate by w, its own passes do not.
    assert recorded == [True] * (1 + passes) + [False] * passes


def with_dropout() -> Problem:
    """In both lower levels, before and after what the upper one of them calls of the other."""
    w, head, top = chain3(dropout=0.3).levels
    module = nn.Sequential(nn.Dropout(0.3), head.module, nn.Dropout(0.3))
    return Problem((w, replace(head, module=module), top), torch.float64)


@pytest.mark.parametrize(
    "estimator", [Unrolled(2), Truncated(2), Identity(), Sama(), DAMPED], ids=str
)
def test_what_the_newest_step_computed_below_is_kept(estimator: Any) -> None:
    options = {"num_steps": 2, "num_micro": 2}
    kept, repeated = (
        Trained(with_dropout(), estimator, keep_activations=keeps, **options)
        for keeps in (True, False)
    )
    value = kept.hypergradient()
    assert_close(value, repeated.hypergradient())
    assert repeated.calls - kept.calls == {"w": 2}  # the newest step's two micro-batches
    assert_close(kept.hypergradient(), value)  # what was kept serves once
    assert kept.calls == repeated.calls


@pytest.mark.parametrize("estimator", [Unrolled(2), Truncated(2)], ids=str)
def test_what_was_kept_is_what_the_reference_computes(estimator: Any) -> None:
    torch.manual_seed(4)
    run = Run(with_dropout(), num_steps=2, num_micro=2, estimator=estimator)
    assert relative_error(*run.compare(with_hessian=estimator.keeps_hessian)) <= 1e-10


def test_two_levels_above_one_of_which_one_sees_more_below() -> None:
    def problem() -> Problem:
        torch.manual_seed(0)
        top = top_loss("head")
        return problem_of(
            torch.float64,
            LevelSpec("w", Backbone(NUM_INPUTS), reconstruction_loss, upper=("theta", "rates"),
                      settings=lambda models: models["rates"]()),
            LevelSpec("head", Head(), head_loss("head", weighted=True), ("w",), ("theta",)),
            LevelSpec("theta", Weighter(NUM_INPUTS), top, lower=("w", "head")),
            LevelSpec("rates", Rates([0.02, 0.04], [0.05, 0.02]), top, lower=("w", "head")),
        )  # fmt: skip

    def expected(run: Trained, target: str) -> Any:
        levels = []
        for spec in run.problem.lower[:2]:
            module, optimizer = run.before[spec.name]
            rules, batches = OptimizerRules.of(optimizer, module), [run.batches[spec.name]]
            levels.append(
                ReferenceLevel(spec.name, module, spec.loss, batches, rules, spec.settings)
            )
        for spec in sorted(run.problem.levels[2:], key=lambda spec: spec.name != target):
            levels.append(
                ReferenceLevel(spec.name, spec.module, spec.loss, [run.batches[spec.name]])
            )
        return hypergradient(levels, target)

    for order in (("theta", "rates"), ("rates", "theta")):
        run = Trained(problem(), Unrolled(), num_micro=2)
        for target in order:
            assert relative_error(run.hypergradient(target), expected(run, target)) <= 1e-10


# --- traces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", ["w", "head", "theta"])
@pytest.mark.parametrize("estimator", [Unrolled(2), Shift(Neumann(1, 0.1))], ids=str)
def test_a_loss_that_fails_leaves_no_trace(estimator: Any, culprit: str) -> None:
    broken: list[str] = []

    def failing(spec: LevelSpec) -> LevelSpec:
        def loss(models: Models, batch: Batch) -> Tensor:
            value = spec.loss(models, batch)
            if spec.name in broken:
                raise ArithmeticError("no loss today")
            return value

        return replace(spec, loss=loss)

    problem = chain3(dropout=0.3)
    problem = replace(problem, levels=tuple(failing(spec) for spec in problem.levels))
    run = Trained(problem, estimator, num_steps=2, num_micro=2)
    before = snapshot([*run.levels.values()])
    broken.append(culprit)
    with pytest.raises(ArithmeticError):
        run.hypergradient()
    for old, new in zip(before, snapshot([*run.levels.values()]), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    with pytest.raises(RuntimeError, match="after its evaluation had ended"):
        run.levels["w"].twin.root(run.batches["w"][0][0])
    broken.clear()
    unbroken = Trained(chain3(dropout=0.3), estimator, num_steps=2, num_micro=2)
    assert_close(run.hypergradient(), unbroken.hypergradient())
