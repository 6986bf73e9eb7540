"""Cycles, traces left behind, and bad use, in one process."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import Identity, Level, Multilevel, Sama, Truncated, Unrolled
from mlomae.hypergrad.reference import OptimizerRules, ReferenceLevel, Weights, hypergradient
from tests.hypergrad.problems import Problem, chain2, chain3, diamond, make_optimizer


def levels_of(problem: Problem, num_steps: int = 1) -> list[Level]:
    return [
        Level(
            spec.name, spec.module, make_optimizer("adamw", spec.module), loss=spec.loss,
            lower=spec.lower, upper=spec.upper,
            num_steps=num_steps if spec in problem.lower else 1,
        )
        for spec in problem.levels
    ]  # fmt: skip


def stream(problem: Problem, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    return (problem.batch(generator) for _ in itertools.count())


def assert_close(value: Weights, expected: Weights) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(value[name], tensor, rtol=1e-10, atol=1e-14)


# --- cycles ----------------------------------------------------------------------------------


def test_cycles_train_along_the_reference() -> None:
    problem, twin = chain3(), chain3()
    multilevel = Multilevel(levels_of(problem, 2), estimator=Unrolled(steps=2))
    optimizers = [make_optimizer("adamw", spec.module) for spec in twin.levels]
    names = [spec.name for spec in twin.levels]
    mine = {name: stream(problem, i) for i, name in enumerate(names)}
    theirs = {name: stream(twin, i) for i, name in enumerate(names)}
    for _ in range(3):
        losses = multilevel.cycle(mine)
        batches = {name: [[next(theirs[name])] for _ in range(2)] for name in names[:-1]}
        batches[names[-1]] = [[next(theirs[names[-1]])]]
        expected = plain_cycle(twin, optimizers, batches)
        assert {n: v.item() for n, v in losses.items()} == pytest.approx(expected, rel=1e-10)
    for spec, other in zip(problem.levels, twin.levels, strict=True):
        assert_close(spec.module.state_dict(), other.module.state_dict())


def plain_cycle(
    problem: Problem, optimizers: Sequence[torch.optim.Optimizer], batches: dict[str, Any]
) -> dict[str, float]:
    """Torch's own steps of the lower levels, and one of the target along the reference."""
    references = [
        ReferenceLevel(
            spec.name, spec.module, spec.loss, batches[spec.name],
            OptimizerRules.of(optimizer, spec.module),
        )
        for spec, optimizer in zip(problem.levels, optimizers, strict=True)
    ]  # fmt: skip
    gradient = hypergradient(references, problem.target.name)
    models = {spec.name: spec.module for spec in problem.levels}
    losses = {}
    for spec, optimizer in zip(problem.lower, optimizers, strict=False):
        values = []
        for (batch,) in batches[spec.name]:
            optimizer.zero_grad()
            values.append(spec.loss(models, batch))
            values[-1].backward()
            optimizer.step()
        losses[spec.name] = torch.stack(values).mean().item()
    target = problem.target
    losses[target.name] = target.loss(models, batches[target.name][0][0]).item()
    for name, param in target.module.named_parameters():
        param.grad = gradient[name]
    optimizers[-1].step()
    return losses


def test_two_levels_above_one() -> None:
    """Both hypergradients belong to the weights before either level moves."""
    spec, theta = chain2().levels
    second = copy.deepcopy(theta.module)

    def loss(models: Any, batch: Any) -> Tensor:
        both = {**models, "theta": lambda x: models["theta"](x) * models["second"](x)}
        return spec.loss(both, batch)

    modules = {"train": spec.module, "theta": theta.module, "second": second}
    losses = {"train": loss, "theta": theta.loss, "second": theta.loss}
    batch, top = (next(stream(chain2(), seed)) for seed in (1, 2))
    levels = {
        name: Level(
            name, module, make_optimizer("momentum", module), loss=losses[name],
            upper=("theta", "second") if name == "train" else (),
            lower=() if name == "train" else ("train",),
        )
        for name, module in modules.items()
    }  # fmt: skip
    rules = OptimizerRules.of(levels["train"].optimizer, spec.module)
    references = {
        "train": ReferenceLevel("train", spec.module, loss, [[batch]], rules),
        "theta": ReferenceLevel("theta", theta.module, theta.loss, [[top]]),
        "second": ReferenceLevel("second", second, theta.loss, [[top]]),
    }
    problem = Multilevel(levels.values(), estimator=Unrolled())
    levels["train"].step(batch)
    for target, constant in itertools.permutations(("theta", "second")):
        expected = hypergradient([references[n] for n in ("train", target, constant)], target)
        assert_close(levels[target].named(problem.hypergradient(target, top).vector), expected)


# --- traces ----------------------------------------------------------------------------------


def snapshot(levels: Sequence[Level]) -> list[Any]:
    """Everything about the levels and the generator that could change."""
    values: list[Any] = [torch.get_rng_state()]
    for level in levels:
        values += [*level.model.state_dict().values(), *(p.grad for p in level.model.parameters())]
        values += [module.training for module in level.model.modules()]
        for state in level.optimizer.state.values():
            values += state.values()
        values += [{k: v for k, v in g.items() if k != "params"}
                   for g in level.optimizer.param_groups]  # fmt: skip
    return copy.deepcopy(values)


@pytest.mark.parametrize("estimator", [Unrolled(2), Truncated(2), Identity(), Sama()], ids=str)
def test_a_hypergradient_leaves_no_trace(estimator: Any) -> None:
    problem = chain3(dropout=0.4)
    levels = levels_of(problem, 2)
    multilevel = Multilevel(levels, estimator=estimator)
    batches = stream(problem, 1)
    for level in levels[:-1]:
        level.step(next(batches)), level.step(next(batches))
    levels[0].model.block.eval()
    last = next(batches)
    before = snapshot(levels)
    first = multilevel.hypergradient("theta", last)
    for old, new in zip(before, snapshot(levels), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    second = multilevel.hypergradient("theta", last)
    assert all(map(torch.equal, first.vector, second.vector))
    assert torch.equal(first.loss, second.loss) and not first.loss.requires_grad


def test_discarded_steps_change_nothing_and_are_missed() -> None:
    problem = chain2()
    train, theta = levels_of(problem)
    multilevel = Multilevel([train, theta])
    batch = next(stream(problem, 1))
    before = snapshot([train])
    assert train.backward(batch).item() == pytest.approx(
        problem.levels[0].loss({s.name: s.module for s in problem.levels}, batch).item()
    )
    train.discard()
    for old, new in zip(before, snapshot([train]), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    with pytest.raises(RuntimeError, match="level train has taken 0 recorded steps"):
        multilevel.hypergradient("theta", batch)


# --- bad use ---------------------------------------------------------------------------------


def level(name: str, lower: Sequence[str] = (), upper: Sequence[str] = (), **options: Any) -> Level:
    module = nn.Linear(2, 2)
    optimizer = options.pop("optimizer", torch.optim.SGD)(module.parameters(), lr=0.1)

    def loss(models: Any, batch: Any) -> Tensor:
        return sum(models[n](batch).square().mean() for n in (name, *lower, *upper))

    options = {"loss": loss, "lower": lower, "upper": upper} | options
    return Level(name, module, optimizer, **options)


def theta(*lower: str) -> Level:
    return level("theta", lower)


@pytest.mark.parametrize(("levels", "message"), [
    (lambda: [level("a", ["b"]), level("b", ["a"])], "in a cycle, (a -> b -> a|b -> a -> b)"),
    (lambda: [level("a"), level("a")], "two levels have the same name"),
    (lambda: [level("a", upper=["nobody"])], "level a names 'nobody'"),
    (lambda: [level("a", upper=["a"])], "level a names 'a'"),
    (lambda: [level("a", ["b"], ["b"]), level("b")], "names 'b' in lower and in upper"),
    (lambda: [level("a"), theta("a")], "no loss below depends on the weights of level theta"),
    (lambda: [level("a", upper=["theta"]), theta()], "loss of theta does not depend on a"),
    (lambda: [level("a", upper=["theta"], num_steps=2), theta("a")],
     r"takes 2 steps in a cycle, but Unrolled\(steps=3\) asks for 3"),
    (lambda: [level("a", upper=["b"], num_steps=3), level("b", ["a"], ["theta"], num_steps=3),
              theta("b")], "needs third derivatives"),
    (lambda: [level("a", upper=["theta"], num_steps=3, optimizer=torch.optim.Adagrad), theta("a")],
     "Adagrad has no adjoint here"),
])  # fmt: skip
def test_bad_graphs_are_refused(levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multilevel(levels(), estimator=Unrolled(steps=3))


def test_too_few_steps_are_refused() -> None:
    problem = diamond()
    levels = levels_of(problem, 2)
    multilevel = Multilevel(levels, estimator=Unrolled(steps=2))
    batches = stream(problem, 1)
    for lower, num_steps in zip(levels, (2, 2, 1), strict=False):
        for _ in range(num_steps):
            lower.step(next(batches))
    message = r"level head2 has taken 1 recorded steps .* 2 are needed"
    with pytest.raises(RuntimeError, match=message):
        multilevel.hypergradient("theta", next(batches))


@pytest.mark.parametrize(("options", "message"), [
    ({"loss": lambda models, x: models["a"](x) * models["theta"](x)},
     r"loss of level a must be a scalar, got \(3, 2\)"),
    ({"loss": lambda models, x: 0.5}, "loss of level a must be a scalar, got float"),
    ({"loss": lambda models, x: models["a"](x).sum()}, "names theta in upper, but its loss never"),
    ({"loss": lambda models, x: models["b"](x).sum()}, r"loss of level a uses models\['b'\]"),
    ({"settings": lambda models: [{"momentum": 0.9}]}, "use lr and weight_decay only"),
])  # fmt: skip
def test_bad_losses_and_settings_are_refused(options: dict[str, Any], message: str) -> None:
    bottom = level("a", upper=["theta"], **options)
    _problem = Multilevel([bottom, theta("a")])
    with pytest.raises(ValueError, match=message):
        bottom.step(torch.ones(3, 2))


def test_a_level_above_that_is_used_without_derivative_is_refused() -> None:
    def loss(models: Any, batch: Tensor) -> Tensor:
        return (models["a"](batch) * models["theta"](batch).detach()).mean()

    bottom = level("a", upper=["theta"], loss=loss)
    top = level("theta", ["a"], loss=lambda models, batch: models["a"](batch).square().mean())
    multilevel = Multilevel([bottom, top])
    bottom.step(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"no loss below uses models\['theta'\] differentiably"):
        multilevel.hypergradient("theta", torch.ones(3, 2))


def test_another_error_of_the_model_is_not_hidden() -> None:
    bottom = level("a", upper=["theta"])
    _problem = Multilevel([bottom, theta("a")])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        bottom.step(torch.ones(3, 5))
