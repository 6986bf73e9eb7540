"""Estimators against closed forms and against their definitions."""

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlomae.hypergrad import (
    ConjugateGradient,
    FiniteDifference,
    Identity,
    Level,
    Multilevel,
    Neumann,
    Sama,
    Truncated,
    Unrolled,
)
from mlomae.hypergrad.reference import Weights, relative_error
from tests.hypergrad.problems import (
    PROBLEMS,
    LevelSpec,
    Models,
    Problem,
    make_optimizer,
)

DAMPED = ConjugateGradient(3, damping=5.0)  # the Hessians of networks are indefinite
ESTIMATORS = [Unrolled(1), Unrolled(3), Truncated(3), Identity(), Sama(), Neumann(3, 0.1), DAMPED]
NARROW = [4.0, 7.0, 8.0, 8.0, 9.0, 10.0]
GENTLE = [1.0, 2.0, 4.0, 5.0, 8.0, 10.0]
STEEP = [1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]


class Trained:
    """A problem whose lower levels have taken their steps: the same bits whatever the estimator.

    Attributes:
        calls: of each level's model by the latest hypergradient.
        batches: the micro-batches of each level's last step, and of the target.
        before: each lower level's module and optimizer before its last step.
    """

    def __init__(
        self,
        problem: Problem,
        estimator: Any,
        kind: str = "adamw",
        num_steps: int = 1,
        num_micro: int = 1,
        keep_activations: bool = True,
    ) -> None:
        torch.manual_seed(4)
        self.generator = torch.Generator().manual_seed(1)
        self.problem, self.num_micro, self.calls = problem, num_micro, Counter[str]()
        self.levels = {spec.name: self._level(spec, kind, num_steps) for spec in problem.levels}
        self.multilevel = Multilevel(
            self.levels.values(), estimator=estimator, keep_activations=keep_activations
        )
        self.batches: dict[str, list[Any]] = {}
        self.before: dict[str, Any] = {}
        for num in (2, num_steps):  # the first ones are forgotten; Adam's have next to no slope
            self.multilevel.clear()
            for spec in problem.levels:
                for _ in range(num):
                    self._step(spec)

    def hypergradient(self, target: str = "theta") -> Weights:
        self.calls.clear()
        result = self.multilevel.hypergradient(target, *self.batches[target])
        return self.levels[target].named(result.vector)

    def _level(self, spec: LevelSpec, kind: str, num_steps: int) -> Level:
        def count(*_: Any) -> None:
            self.calls[spec.name] += 1

        spec.module.register_forward_hook(count)
        return Level(
            spec.name, spec.module, make_optimizer(kind, spec.module), loss=spec.loss,
            lower=spec.lower, upper=spec.upper, num_steps=num_steps, settings=spec.settings,
        )  # fmt: skip

    def _step(self, spec: LevelSpec) -> None:
        batches = [self.problem.batch(self.generator) for _ in range(self.num_micro)]
        self.batches[spec.name] = batches
        if any(spec.name in other.lower for other in self.problem.levels):
            level = self.levels[spec.name]
            self.before[spec.name] = copy.deepcopy((level.model, level.optimizer))
            level.step(*batches)


# --- closed forms ----------------------------------------------------------------------------


class Point(nn.Module):
    """Its weight alone."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def forward(self) -> Tensor:
        return self.value


class Quadratics:
    """Levels at the minima of x_i'A_i x_i / 2 - (B_i x_(i-1) + b_i)'x_i above x_0 = theta.

    The loss of theta is |x_n - t|^2 / 2 + e'x_1. So with a_n = x_n - t, a_(i-1) = B_i'A_i^-1 a_i,
    and e added to a_1, its derivative by theta is a_0.

    Args:
        eigenvalues: of every A_i.
        depth: n.
        is_flat: t = x_n and e = 0, so that every adjoint is zero.
    """

    def __init__(self, eigenvalues: list[float], depth: int = 1, is_flat: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        n = len(eigenvalues)
        draws = torch.randn(depth + 1, 2 * n + 2, n, generator=generator, dtype=torch.float64)
        self.a, self.b, self.shifts = [], [], []
        self.minima = [draws[-1, 0]]
        for draw in draws[:-1]:
            basis, _ = torch.linalg.qr(draw[:n])
            self.a.append(basis @ torch.tensor(eigenvalues).double().diag() @ basis.T)
            self.b.append(draw[n : 2 * n])
            self.shifts.append(draw[-1])
            right = self.b[-1] @ self.minima[-1] + self.shifts[-1]
            self.minima.append(torch.linalg.solve(self.a[-1], right))
        self.goal = self.minima[-1] if is_flat else draws[-1, 1]
        self.e = draws[-1, 2] * (not is_flat)
        self.names = ["theta", "x1", "x2"][: depth + 1]
        self.reads = Counter[str]()

    def expected(self, inverse: Callable[[Tensor], Tensor] = torch.linalg.inv) -> Tensor:
        """The closed form with an approximate inverse of each A_i."""
        adjoint = self.minima[-1] - self.goal
        for i in reversed(range(len(self.a))):
            adjoint = adjoint + self.e if i == 0 else adjoint
            adjoint = self.b[i].T @ (inverse(self.a[i]) @ adjoint)
        return adjoint

    def estimate(self, estimator: Any) -> Tensor:
        levels = [self._level(i) for i in range(len(self.names))]
        problem = Multilevel(levels, estimator=estimator)
        for lower in levels[1:]:
            lower.step(None)
        self.reads.clear()
        return levels[0].named(problem.hypergradient("theta", None).vector)["value"]

    def error(self, estimator: Any, inverse: Any = torch.linalg.inv) -> float:
        expected = self.expected(inverse)
        return float((self.estimate(estimator) - expected).norm() / expected.norm())

    def _level(self, i: int) -> Level:
        name, module = self.names[i], Point(self.minima[i])
        module.register_forward_hook(lambda *_: self.reads.update([name]))
        return Level(
            name, module, torch.optim.SGD(module.parameters(), lr=1e-3),
            loss=(lambda models, _: self._loss(models, i)) if i else self._top,
            lower=[self.names[i - 1]] if i > 1 else self.names[1:] if i == 0 else (),
            upper=["theta"] if i == 1 else (),
        )  # fmt: skip

    def _loss(self, models: Models, i: int) -> Tensor:
        x, below = models[self.names[i]](), models[self.names[i - 1]]()
        return x @ self.a[i - 1] @ x / 2 - (self.b[i - 1] @ below + self.shifts[i - 1]) @ x

    def _top(self, models: Models, _: Any) -> Tensor:
        distance = models[self.names[-1]]() - self.goal
        return distance.square().sum() / 2 + self.e @ models["x1"]()


def one(a: Tensor) -> Tensor:
    return torch.eye(len(a)).to(a)


def series(terms: int, step_size: float) -> Callable[[Tensor], Tensor]:
    """A -> alpha * sum over i <= K of (I - alpha A)^i."""

    def inverse(a: Tensor) -> Tensor:
        powers = [torch.linalg.matrix_power(one(a) - step_size * a, i) for i in range(terms + 1)]
        return step_size * torch.stack(powers).sum(0)

    return inverse


@pytest.mark.parametrize("depth", [1, 2])
def test_neumann_converges_as_its_spectral_radius(depth: int) -> None:
    problem = Quadratics(NARROW, depth)
    for terms in (0, 1, 7):
        assert problem.error(Neumann(terms, 0.1), series(terms, 0.1)) <= 1e-12
    errors = {terms: problem.error(Neumann(terms, 0.1)) for terms in (20, 25, 50)}
    # The slowest eigenvalue is 4: each term leaves 1 - 0.1 * 4 of the error.
    assert errors[25] / errors[20] == pytest.approx(0.6**5, rel=1e-2)
    assert errors[50] <= 1e-10


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("eigenvalues", [GENTLE, STEEP])
def test_conjugate_gradients_are_exact_in_n_iterations(
    eigenvalues: list[float], depth: int
) -> None:
    problem = Quadratics(eigenvalues, depth)
    assert problem.error(ConjugateGradient(len(eigenvalues), tolerance=0.0)) <= 1e-10
    assert problem.error(ConjugateGradient(len(eigenvalues) - 2, tolerance=0.0)) > 1e-4
    damped = ConjugateGradient(len(eigenvalues), tolerance=0.0, damping=0.7)
    assert problem.error(damped, lambda a: torch.linalg.inv(a + 0.7 * one(a))) <= 1e-10


def test_conjugate_gradients_stop_at_the_tolerance() -> None:
    problem = Quadratics([2.0, 2.0, 2.0, 5.0, 5.0, 5.0])  # two values, so two iterations are exact
    for tolerance, num_products in ((1e-8, 2), (0.99, 1), (2.0, 0)):
        error = problem.error(ConjugateGradient(6, tolerance))
        assert problem.reads["x1"] == num_products + 3  # the mixed product, and twice at the top
        assert (error <= 1e-12) == (num_products == 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_identity_on_quadratics(depth: int) -> None:
    problem = Quadratics(GENTLE, depth)
    assert problem.error(Identity(), one) <= 1e-12
    for estimator in (Sama(), Unrolled(), Truncated()):
        assert problem.error(estimator, lambda a: 1e-3 * one(a)) <= 1e-12  # the learning rate


def test_an_indefinite_hessian_is_told(caplog: pytest.LogCaptureFixture) -> None:
    problem = Quadratics([-3.0, -2.0, 1.0, 2.0, 4.0, 5.0])
    with caplog.at_level(logging.WARNING):
        assert problem.estimate(ConjugateGradient(6)).isfinite().all()
    assert "level x1 is not positive definite" in caplog.text and "raise damping" in caplog.text
    caplog.clear()
    problem.estimate(ConjugateGradient(6, damping=4.0))
    assert not caplog.text


@pytest.mark.parametrize("estimator", ESTIMATORS[:1] + ESTIMATORS[3:], ids=str)
def test_a_zero_adjoint_gives_zero(estimator: Any) -> None:
    problem = Quadratics(GENTLE, 2, is_flat=True)
    for each in (estimator, FiniteDifference(estimator, radius=0.01)):
        # Levels stand at their minima but for rounding, which a step may change.
        assert problem.estimate(each).norm() <= 1e-12


# --- definitions -----------------------------------------------------------------------------


def definition(run: Trained, through_step: Callable[[str, list[Tensor]], list[Tensor]]) -> Weights:
    """One mixed product for each level by double backward, at newest weights and last batches."""
    models = {name: copy.deepcopy(level.model) for name, level in run.levels.items()}
    params = {name: list(model.parameters()) for name, model in models.items()}
    everything = [p for group in params.values() for p in group]
    *lower, target = run.problem.levels
    loss = mean_loss(target, models, run.batches)
    adjoint = dict(zip(everything, derivative(loss, everything), strict=True))
    for spec in reversed(lower):
        cotangent = through_step(spec.name, [adjoint[p] for p in params[spec.name]])
        grads = derivative(mean_loss(spec, models, run.batches), params[spec.name])
        product = sum((g * c.detach()).sum() for g, c in zip(grads, cotangent, strict=True))
        others = [p for name in (*spec.lower, *spec.upper) for p in params[name]]
        for param, part in zip(others, derivative(product, others), strict=True):
            adjoint[param] = adjoint[param] + part
    return {name: adjoint[p].detach() for name, p in models[target.name].named_parameters()}


def mean_loss(spec: LevelSpec, models: Models, batches: dict[str, list[Any]]) -> Tensor:
    return torch.stack([spec.loss(models, batch) for batch in batches[spec.name]]).mean()


def derivative(value: Tensor, params: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, params, create_graph=True, materialize_grads=True)


def by_differences(run: Trained, name: str, adjoint: list[Tensor]) -> list[Tensor]:
    """lambda times dw'/dg, from central differences of torch's own step, elementwise."""
    spec = next(spec for spec in run.problem.levels if spec.name == name)
    before, optimizer = run.before[name]
    models = {n: copy.deepcopy(level.model) for n, level in run.levels.items()} | {name: before}
    grads = derivative(mean_loss(spec, models, run.batches), list(before.parameters()))
    steps = [1e-6 * grad.detach().abs().mean() for grad in grads]

    def moved(sign: int) -> list[Tensor]:
        module, stepped = copy.deepcopy((before, optimizer))
        for param, grad, step in zip(module.parameters(), grads, steps, strict=True):
            param.grad = grad.detach() + sign * step
        stepped.step()
        return [p.detach() for p in module.parameters()]

    sides = zip(moved(1), moved(-1), steps, adjoint, strict=True)
    return [a * (plus - minus) / (2 * step) for plus, minus, step, a in sides]


@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize("name", ["chain2", "chain3", "diamond", "shared"])
def test_identity_is_what_it_says(name: str, num_micro: int) -> None:
    run = Trained(PROBLEMS[name](), Identity(), num_steps=2, num_micro=num_micro)
    with sdpa_kernel(SDPBackend.MATH):
        expected = definition(run, lambda _, adjoint: [-a for a in adjoint])
    assert relative_error(run.hypergradient(), expected) <= 1e-10


@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("name", ["chain2", "chain3", "diamond", "shared"])
def test_sama_is_what_it_says(name: str, kind: str, num_micro: int) -> None:
    run = Trained(PROBLEMS[name](), Sama(), kind, num_steps=2, num_micro=num_micro)
    with sdpa_kernel(SDPBackend.MATH):
        expected = definition(run, lambda *arguments: by_differences(run, *arguments))
    assert relative_error(run.hypergradient(), expected) <= 1e-6  # of the differences
