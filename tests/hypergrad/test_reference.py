"""The float64 reference against torch's own optimizers, rerun from hypervariables nearby."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    Weights,
    hypergradient,
    relative_error,
    unroll,
)
from tests.hypergrad.problems import (
    OPTIMIZERS,
    PROBLEMS,
    Problem,
    chain2,
    chain3,
    coupled,
    diamond,
    make_optimizer,
    shared,
)

# Steps before the differentiated ones: at a first step of Adam the update is the gradient's sign,
# whose slope is next to nothing.
NUM_WARM_STEPS = 2


class Training:
    """A problem's levels under torch's own optimizers, in plain loops."""

    def __init__(self, problem: Problem, kind: str, max_norm: float = 0.0) -> None:
        self.problem, self.max_norm = copy.deepcopy(problem), max_norm
        self.models = {level.name: level.module for level in self.problem.levels}
        self.optimizers = {lv.name: make_optimizer(kind, lv.module) for lv in self.problem.lower}
        self.random_states: dict[str, list[list[Tensor]]] = {n: [] for n in self.models}

    def step(self, name: str, micro_batches: Sequence[Any], **changes: float) -> None:
        """One step of one level; `changes` are settings for all of its parameter groups."""
        level = next(lv for lv in self.problem.levels if lv.name == name)
        optimizer = self.optimizers[name]
        settings = level.settings(self.models) if level.settings else [{}, {}]
        for group, changed in zip(optimizer.param_groups, settings, strict=True):
            group.update({key: value.item() for key, value in changed.items()} | changes)
        optimizer.zero_grad()
        self.loss(name, micro_batches).backward()
        if self.max_norm:
            nn.utils.clip_grad_norm_(level.module.parameters(), self.max_norm)
        optimizer.step()

    def loss(self, name: str, micro_batches: Sequence[Any]) -> Tensor:
        level = next(lv for lv in self.problem.levels if lv.name == name)
        losses, states = [], []
        for batch in micro_batches:
            states.append(torch.get_rng_state())
            losses.append(level.loss(self.models, batch))
        self.random_states[name].append(states)
        return torch.stack(losses).mean()

    def run(self, batches: dict[str, list[list[Any]]], schedule: Sequence[float] = ()) -> Tensor:
        """All steps of all levels, one level after the other, then the target's loss."""
        for level in self.problem.lower:
            for i, micro_batches in enumerate(batches[level.name]):
                self.step(level.name, micro_batches, **({"lr": schedule[i]} if schedule else {}))
        target = self.problem.target.name
        return self.loss(target, batches[target][0])


def draw(problem: Problem, num_steps: int, num_micro: int = 1, seed: int = 1) -> dict[str, Any]:
    """For each level `num_steps` lists of micro-batches; one list for the target."""
    generator = torch.Generator().manual_seed(seed)
    counts = {level.name: num_steps for level in problem.lower} | {problem.target.name: 1}
    return {
        name: [[problem.batch(generator) for _ in range(num_micro)] for _ in range(count)]
        for name, count in counts.items()
    }


def warm(problem: Problem, kind: str, max_norm: float = 0.0) -> Training:
    training = Training(problem, kind, max_norm)
    training.run(draw(problem, NUM_WARM_STEPS, seed=2))
    training.random_states = {name: [] for name in training.models}
    return training


def reference_of(
    training: Training, batches: dict[str, Any], schedule: Sequence[float] = ()
) -> list[ReferenceLevel]:
    """The reference's levels as the training stands now."""
    levels = []
    for level in training.problem.levels:
        optimizer = training.optimizers.get(level.name)
        reference = ReferenceLevel(
            level.name, level.module, level.loss, batches[level.name], settings=level.settings
        )
        if optimizer:
            reference.rules = OptimizerRules.of(optimizer, level.module, training.max_norm)
            reference.schedule = [[{"lr": lr}] * 2 for lr in schedule]
        levels.append(reference)
    return levels


def slope(training: Training, batches: dict[str, Any], direction: Weights, *args: Any) -> float:
    """dF along a direction of the target's weights, by differences of fourth order."""

    def value(distance: float) -> float:
        moved = copy.deepcopy(training)
        for name, param in moved.problem.target.module.named_parameters():
            param.data += distance * direction[name]
        with torch.random.fork_rng(devices=[]):
            return moved.run(batches, *args).item()

    near, far = (value(h) - value(-h) for h in (1e-3, 2e-3))
    return (8 * near - far) / 12e-3


def check(training: Training, batches: dict[str, Any], *args: Any) -> None:
    """Compare final weights with torch's, and the hypergradient's slope with differences."""
    levels, target = reference_of(training, batches, *args), training.problem.target.name
    after = copy.deepcopy(training)
    with torch.random.fork_rng(devices=[]):
        after.run(batches, *args)
    for level in levels:
        level.random_states = after.random_states[level.name]
    gradient = hypergradient(levels, target)
    direction = somewhere_along(gradient)
    expected = sum((g * direction[n]).sum() for n, g in gradient.items())
    assert slope(training, batches, direction, *args) == pytest.approx(float(expected), rel=1e-6)
    with torch.random.fork_rng(devices=[]):
        weights = unroll(levels, target)
    for level in after.problem.lower:
        for name, param in level.module.named_parameters():
            torch.testing.assert_close(weights[level.name][name], param, rtol=1e-12, atol=1e-12)


def somewhere_along(gradient: Weights) -> Weights:
    """A random direction of length 1, but with the slope of none of the tensors lost in it."""
    generator = torch.Generator().manual_seed(3)
    mixed = {}
    for name, grad in gradient.items():
        noise = torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
        mixed[name] = grad / grad.norm() + noise / noise.norm()
    length = sum(d.square().sum() for d in mixed.values()) ** 0.5
    return {name: d / length for name, d in mixed.items()}


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_slope_and_weights(name: str, kind: str, num_steps: int) -> None:
    training = warm(PROBLEMS[name](), kind)
    check(training, draw(training.problem, num_steps))


@pytest.mark.parametrize("kind", ["nesterov", "momentum", "adam"])
def test_from_a_cold_start(kind: str) -> None:
    training = Training(diamond(), kind)
    if kind == "adam":  # smooth where the gradients are no larger than eps
        for optimizer in training.optimizers.values():
            for group in optimizer.param_groups:
                group["eps"] = 0.1
    check(training, draw(training.problem, 3))


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_clipping(kind: str) -> None:
    training = warm(diamond(), kind, max_norm=0.05)
    batches = draw(training.problem, 2)
    check(training, batches)
    clipped = hypergradient(reference_of(training, batches), "theta")
    training.max_norm = 1e3  # never reached
    check(training, batches)
    free = hypergradient(reference_of(training, batches), "theta")
    assert relative_error(clipped, free) > 0.1


def test_schedule() -> None:
    training = warm(chain3(), "adamw")
    check(training, draw(training.problem, 3), (0.03, 0.01, 0.002))


def test_micro_batches() -> None:
    training = warm(shared(), "momentum")
    check(training, draw(training.problem, 2, num_micro=3))


@pytest.mark.parametrize("problem", [chain2, chain3])
def test_dropout(problem: Callable[..., Problem]) -> None:
    training = warm(problem(dropout=0.3), "adamw")
    check(training, draw(training.problem, 2, num_micro=2))


def test_weights_that_the_loss_does_not_read_stay() -> None:
    training = warm(chain2(), "momentum")
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    training.models["train"].spare = spare
    training.optimizers["train"].param_groups[0]["params"].append(spare)
    batches = draw(training.problem, 2)
    levels = reference_of(training, batches)
    training.run(batches)
    weights = unroll(levels, "theta")["train"]
    assert weights["spare"].tolist() == spare.tolist() == [1, 1, 1]


def test_without_hessian_one_step_is_exact_and_more_are_not() -> None:
    training = warm(coupled(), "adamw")
    for num_steps, is_exact in ((1, True), (3, False)):
        levels = reference_of(training, draw(training.problem, num_steps))
        truncated = hypergradient(levels, "theta", with_hessian=False)
        error = relative_error(truncated, hypergradient(levels, "theta"))
        assert error == 0 if is_exact else 0.01 < error < 1


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self) -> Tensor:
        return self.value


def test_a_step_takes_the_partial_gradient() -> None:
    # w+ = w - lr c w, then c+ = c - lr w+^2 / 2 with w+ held fixed, F = c+ theta + w+ theta.
    def level(name: str, value: float, loss: Any, num_steps: int) -> ReferenceLevel:
        module = Scalar(value)
        rules = OptimizerRules.of(torch.optim.SGD(module.parameters(), lr=0.5), module)
        return ReferenceLevel(name, module, loss, [[None]] * num_steps, rules)

    levels = [
        level("w", 2.0, lambda models, _: models["c"]() * models["w"]().square() / 2, 1),
        level("c", 3.0, lambda models, _: models["c"]() * models["w"]().square() / 2, 1),
        level("theta", 4.0, lambda m, _: (m["c"]() + m["w"]()) * m["theta"](), 1),
    ]
    new_w = 2 - 0.5 * 3 * 2
    new_c = 3 - 0.5 * new_w**2 / 2
    assert hypergradient(levels, "theta")["value"].item() == pytest.approx(new_c + new_w, rel=1e-15)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.Adagrad, {}), (torch.optim.Adam, {"amsgrad": True}),
     (torch.optim.SGD, {"maximize": True})],
)  # fmt: skip
def test_other_optimizers_are_refused(cls: Any, options: dict[str, bool]) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no reference; use SGD, Adam or AdamW"):
        OptimizerRules.of(cls(module.parameters(), **options), module)


def test_leaves_random_state_and_levels_alone() -> None:
    training = warm(chain2(dropout=0.5), "adamw")
    levels = reference_of(training, draw(training.problem, 2))
    before = torch.get_rng_state(), copy.deepcopy(levels[0].rules.memory)
    first, second = (hypergradient(levels, "theta") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert relative_error(first, second) == 0  # the same random numbers, the same memory
    for name, memory in levels[0].rules.memory.items():
        assert all(torch.equal(memory[key], value) for key, value in before[1][name].items())
