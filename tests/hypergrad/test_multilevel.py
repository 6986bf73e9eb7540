"""The engine in one process against the float64 reference, and what it refuses."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import Level, Multilevel, Truncated, Unrolled, WeightedLoss
from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    Weights,
    hypergradient,
    relative_error,
)
from tests.hypergrad.problems import (
    OPTIMIZERS,
    PROBLEMS,
    LevelSpec,
    Problem,
    chain2,
    chain3,
    class_loss,
    coupled,
    diamond,
    make_optimizer,
    problem_of,
    sample_losses,
    sample_weights,
    settings,
    shared,
)

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
NUM_WARM_STEPS = 2  # Adam's first step has next to no slope


@dataclass
class Run:
    """A problem on the engine, which takes its steps while a reference is made from the same."""

    problem: Problem
    kind: str = "adamw"
    num_steps: int = 1
    estimator: Any = None
    num_micro: int = 1
    max_norm: float = 0.0
    gamma: float = 1.0  # factor on the learning rates after each step
    warm: int = NUM_WARM_STEPS
    states: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.levels = [self._level(spec) for spec in self.problem.levels]
        self.estimator = self.estimator or Unrolled(steps=self.num_steps)
        self.multilevel = Multilevel(self.levels, estimator=self.estimator)
        for level in self.levels[:-1]:
            for _ in range(self.warm):
                level.step(*self.batches())
        self.multilevel.clear()

    def batches(self) -> list[Any]:
        return [self.problem.batch(self.generator) for _ in range(self.num_micro)]

    def compare(self, **options: Any) -> tuple[Weights, Weights]:
        """One cycle's hypergradient of the engine, and of the reference."""
        references = [self._step(level) for level in self.levels[:-1]]
        target, batches = self.levels[-1], self.batches()
        references.append(ReferenceLevel(target.name, target.model, target.loss, [batches]))
        self.states.clear()
        result = self.multilevel.hypergradient(target.name, *batches)
        references[-1].random_states = [self.states[: self.num_micro]]
        return target.named(result.vector), hypergradient(references, target.name, **options)

    def _level(self, spec: LevelSpec) -> Level:
        is_target = spec.name == self.problem.target.name
        optimizer = torch.optim.SGD(spec.module.parameters(), lr=0.1)
        options: dict[str, Any] = {}
        if not is_target:
            optimizer = make_optimizer(self.kind, spec.module)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)
            options = {"num_steps": self.num_steps, "max_norm": self.max_norm}
            options["scheduler"] = scheduler if self.gamma != 1 else None
        return Level(
            spec.name, spec.module, optimizer, loss=self._noting(spec.loss),
            lower=spec.lower, upper=spec.upper, settings=spec.settings, **options,
        )  # fmt: skip

    def _noting(self, loss: Any) -> Any:
        if isinstance(loss, WeightedLoss):  # its type matters, and it draws nothing here
            return loss

        def noting(models: Any, batch: Any) -> Tensor:
            self.states.append(torch.get_rng_state())
            return loss(models, batch)

        return noting

    def _step(self, level: Level) -> ReferenceLevel:
        """All steps of a level, and the reference for those that are recorded."""
        batches = [self.batches() for _ in range(self.num_steps)]
        for step in batches[: -level.window]:
            level.step(*step)
        rules = OptimizerRules.of(level.optimizer, level.model, self.max_norm)
        unrolled = batches[-level.window :]
        reference = ReferenceLevel(
            level.name, level.model, level.loss, unrolled, rules, level.settings
        )
        self.states.clear()
        for step in unrolled:
            rates = [{"lr": group["lr"]} for group in level.optimizer.param_groups]
            reference.schedule = [*reference.schedule, rates]
            level.step(*step)
        n = self.num_micro
        reference.random_states = [self.states[i : i + n] for i in range(0, len(self.states), n)]
        return reference


def error_of(problem: Problem, *args: Any, **options: Any) -> float:
    return relative_error(*Run(problem, *args, **options).compare())


# --- exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_unrolled(name: str, kind: str, dtype: torch.dtype, num_steps: int) -> None:
    assert error_of(PROBLEMS[name](dtype), kind, num_steps) <= BOUNDS[dtype]


@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("problem", [chain2, chain3, diamond])
def test_other_numbers_of_steps(problem: Any, kind: str, num_steps: int) -> None:
    assert error_of(problem(), kind, num_steps) <= 1e-10


@pytest.mark.parametrize("kind", ["nesterov", "momentum", "adam"])
@pytest.mark.parametrize("options", [
    {"max_norm": 0.05}, {"max_norm": 1e3}, {"gamma": 0.5}, {"num_micro": 3},
    {"max_norm": 0.05, "gamma": 0.7, "num_micro": 2},
], ids=str)  # fmt: skip
def test_clipping_schedules_and_accumulation(kind: str, options: dict[str, Any]) -> None:
    assert error_of(diamond(), kind, 3, **options) <= 1e-10


@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
def test_learned_settings_of_clipped_steps(kind: str) -> None:
    assert error_of(settings(), kind, 3, max_norm=0.05, num_micro=2) <= 1e-10


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("problem", [chain2, chain3])
def test_dropout(problem: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    error = error_of(problem(dtype, dropout=0.3), num_steps=3, num_micro=2)
    assert error <= BOUNDS[dtype]


@pytest.mark.parametrize("kind", ["momentum", "nesterov"])
def test_cold_start(kind: str) -> None:
    assert error_of(shared(), kind, 3, warm=0) <= 1e-10


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_the_last_steps_of_a_cycle(kind: str) -> None:
    for steps in (1, {"w": 3, "head": 1}, {"w": 2, "head": 4}):
        assert error_of(chain3(), kind, 4, Unrolled(steps)) <= 1e-10


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_truncated(kind: str) -> None:
    for problem in (chain3(), coupled()):
        value, reference = Run(problem, kind, 4, Truncated(steps=3)).compare(with_hessian=False)
        assert relative_error(value, reference) <= 1e-10


@pytest.mark.parametrize("num_steps", [1, 3])
def test_weighted_loss(num_steps: int) -> None:
    def problem() -> Problem:
        train, theta = chain2().levels
        weighted = WeightedLoss(sample_losses, sample_weights)
        return Problem((replace(train, loss=weighted), theta), torch.float64)

    assert error_of(problem(), num_steps=num_steps) <= 1e-10
    assert error_of(problem(), num_steps=num_steps, num_micro=2) <= 1e-10


class Odd(nn.Module):
    """Tied, frozen and unused weights, a weight read twice, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.second, self.frozen, self.unused = nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> tuple[None, Tensor]:
        hidden = self.norm(torch.tanh(self.second(torch.tanh(self.first(tokens.mean(1))))))
        return None, self.frozen(self.first(hidden)).unsqueeze(1)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_odd_modules(kind: str) -> None:
    train, theta = chain2().levels
    problem = problem_of(torch.float64, replace(train, module=Odd()), theta)
    assert error_of(problem, kind, 3) <= 1e-10


class Factor(nn.Module):
    """A factor that is zero, with a derivative, unless the batch adds something."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, added: float) -> Tensor:
        return self.factor + added


def test_a_gradient_that_is_zero_for_once() -> None:
    # After Adam's first step v is zero; the gradient still acts through m on the second.
    def loss(models: Any, batch: Any) -> Tensor:
        return models["theta"](batch[0]) * class_loss(models, batch[1])

    train, theta = chain2().levels
    train = replace(train, loss=loss)
    theta = replace(theta, module=Factor(), loss=lambda models, batch: class_loss(models, batch[1]))
    run = Run(problem_of(torch.float64, train, theta), "adam", 2, warm=0)
    added = iter([0.0, 1.0, 0.0])
    run.batches = lambda: [(next(added), run.problem.batch(run.generator))]
    assert relative_error(*run.compare()) <= 1e-10
