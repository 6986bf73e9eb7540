"""Which estimators are refused where, and in what words."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
from tests.hypergrad.problems import Models, settings
from tests.hypergrad.test_estimator_use import Shift
from tests.hypergrad.test_estimators import Trained
from tests.hypergrad.test_multilevel_use import level, theta


class Cube(torch.autograd.Function):
    """Without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubed(nn.Linear):
    """A linear layer and the third power of it."""

    def __init__(self, power: Any) -> None:
        super().__init__(2, 2)
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return self.power(super().forward(x))


class FlashAttention(nn.Linear):
    __module__ = "flash_attn.modules"


def using(module: nn.Module, estimator: Any) -> tuple[Level, Multilevel]:
    """A level "a" with this model below "theta"."""

    def loss(models: Models, batch: Tensor) -> Tensor:
        return (models["a"](batch) * models["theta"](batch)).mean()

    weights = nn.Linear(2, 2).to(next(module.parameters()).dtype)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, weights)]
    bottom = Level("a", module, sgd[0], loss=loss, upper=["theta"])
    top = Level("theta", weights, sgd[1], loss=lambda m, x: m["a"](x).exp().mean(), lower=["a"])
    return bottom, Multilevel([bottom, top], estimator=estimator)


Amsgrad = partial(torch.optim.AdamW, amsgrad=True)
POINTWISE = [Identity(), Neumann(1, 0.1), ConjugateGradient(1), Shift(Identity())]


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, Amsgrad])
def test_optimizers_that_cannot_be_differentiated(optimizer: Any) -> None:
    for estimator in POINTWISE:
        Multilevel(
            [level("a", upper=["theta"], optimizer=optimizer), theta("a")], estimator=estimator
        )
    for estimator in (Unrolled(), Truncated(), Sama(), Shift(Sama())):
        bottom = level("a", upper=["theta"], optimizer=optimizer)
        with pytest.raises(ValueError, match=r"(Adagrad|amsgrad=True) has no adjoint here"):
            Multilevel([bottom, theta("a")], estimator=estimator)


@pytest.mark.parametrize("estimator", POINTWISE, ids=str)
def test_settings_need_the_optimizer(estimator: Any) -> None:
    with pytest.raises(ValueError, match="does not differentiate settings; use Unrolled"):
        Trained(settings(), estimator)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Unrolled(0), "at least one step of level a must be unrolled"),
    (lambda: Truncated({"b": 1}), "how many steps of level a to unroll"),
    (lambda: Unrolled({"a": 2}), "takes 1 steps in a cycle, but .* asks for 2"),
    (lambda: Neumann(-1, 0.1), "terms must not be negative"),
    (lambda: Neumann(1, 0.0), "step_size must be positive"),
    (lambda: ConjugateGradient(0), "at least one iteration"),
    (lambda: FiniteDifference(Identity()), "either relative_step or radius"),
    (lambda: Shift(Identity(), radius=0.1), "either relative_step or radius"),
    (lambda: Shift(Identity(), relative_step=-1e-4), "must be positive"),
    (lambda: FiniteDifference(Identity(), radius=0.0), "must be positive"),
    (lambda: FiniteDifference(Identity(), radius=1e-9), "below the resolution 1.2e-07 of float32"),
])  # fmt: skip
def test_bad_numbers(make: Any, message: str) -> None:
    bottom = level("a", upper=["theta"])
    with pytest.raises(ValueError, match=message):
        Multilevel([bottom, theta("a")], estimator=make())


def test_bf16_does_not_hold_small_differences() -> None:
    message = "level a: .* 1.0e-04 of their norm is below the resolution 7.8e-03 of bfloat16"
    with pytest.raises(ValueError, match=message):
        using(nn.Linear(2, 2).bfloat16(), Shift(Identity()))
    using(nn.Linear(2, 2).bfloat16(), Shift(Identity(), relative_step=0.1))


def test_weights_that_are_zero_have_no_relative_step() -> None:
    zero, batch = nn.Linear(2, 2), torch.ones(3, 2)
    for param in zero.parameters():
        nn.init.zeros_(param)
    with pytest.raises(ValueError, match=r"level a: its weights are all zero.* give radius"):
        using(zero, Shift(Identity()))
    bottom, problem = using(zero, FiniteDifference(Unrolled(), radius=0.01))
    bottom.step(batch)
    assert all(part.isfinite().all() for part in problem.hypergradient("theta", batch).vector)


@pytest.mark.parametrize("estimator", [Unrolled(), Identity(), Neumann(1, 0.1)], ids=str)
def test_foreign_kernels_are_refused_by_name(estimator: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 2), FlashAttention(2, 2))
    with pytest.raises(ValueError, match="level a: 1 is a FlashAttention of flash_attn, which has"):
        using(module, estimator)
    using(module, Shift(estimator))


@pytest.mark.parametrize("estimator", [Unrolled(), Neumann(2, 0.1)], ids=str)
def test_a_function_without_forward_mode_is_told(estimator: Any) -> None:
    def vector(power: Any, estimator: Any) -> Tensor:
        torch.manual_seed(0)
        batch = torch.randn(3, 2, dtype=torch.float64)
        bottom, problem = using(Cubed(power).double(), estimator)
        bottom.step(batch)
        return torch.cat(problem.hypergradient("theta", batch).vector)

    message = r"level a: .* Cube is an autograd.Function without jvp.* use FiniteDifference"
    with pytest.raises(ValueError, match=message):
        vector(Cube.apply, estimator)
    exact = vector(lambda x: x**3, estimator)
    torch.testing.assert_close(vector(Cube.apply, Shift(estimator)), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("estimator", "text"), [
    (Unrolled({"w": 2}), "Unrolled(steps={'w': 2})"),
    (Truncated(3), "Truncated(steps=3)"),
    (Identity(), "Identity()"),
    (Neumann(3, 0.1), "Neumann(terms=3, step_size=0.1)"),
    (ConjugateGradient(5), "ConjugateGradient(iterations=5, tolerance=1e-10, damping=0.0)"),
    (Shift(Sama()), "FiniteDifference(estimator=Sama(), relative_step=0.0001)"),
    (FiniteDifference(Unrolled(), radius=0.01),
     "FiniteDifference(estimator=Unrolled(steps=1), radius=0.01)"),
], ids=str)  # fmt: skip
def test_what_messages_call_them(estimator: Any, text: str) -> None:
    assert repr(estimator) == text


def test_nested_differences_are_refused() -> None:
    with pytest.raises(ValueError, match="give it an estimator with exact products"):
        Shift(Shift(Identity()))


def test_two_dtypes_in_one_level_are_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="level a: its weights have several dtypes"):
        Level("a", module, optimizer, loss=lambda models, batch: models["a"](batch).sum())
