"""Adjoints of optimizer steps against differences of PyTorch's own optimizers, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.hypergrad.adjoints import ShardAdjoint, ShardStep, adjoint_of, through_clipping

NUM_STEPS = 3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}),
}


def train(
    kind: str, warm_steps: int, shifts: dict[tuple[int, str], float]
) -> tuple[Tensor, list[ShardStep], list[Tensor], torch.optim.Optimizer]:
    """A weight after steps on fixed gradients; gradient, rate or decay of some steps shifted."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, generator=generator, dtype=torch.float64)
    cls, options = OPTIMIZERS[kind]
    optimizer = cls([weight], lr=0.1, **options)
    steps, before = [], []
    for i in range(-warm_steps, NUM_STEPS):
        group = optimizer.param_groups[0]
        group["lr"] = 0.1 / (i + 5) + shifts.get((i, "lr"), 0.0)  # a schedule
        group["weight_decay"] = options["weight_decay"] + shifts.get((i, "weight_decay"), 0.0)
        grad = torch.randn(4, generator=generator, dtype=torch.float64)
        weight.grad = grad + shifts.get((i, "grad"), 0.0)
        settings = {k: v for k, v in group.items() if k != "params"}
        step = ShardStep(weight.grad.clone(), settings, 0, is_first=not optimizer.state[weight])
        before.append(weight.clone())
        optimizer.step()
        state = optimizer.state[weight].items()
        step.state = {k: float(v) if k == "step" else v.clone() for k, v in state if v is not None}
        steps.append(step)
    return weight.clone(), steps[warm_steps:], before[warm_steps:], optimizer


def by_differences(kind: str, warm_steps: int, step: int, what: str) -> Tensor:
    """Central differences; optimizers act on each element by itself."""
    eps = 1e-6
    plus, minus = (train(kind, warm_steps, {(step, what): s * eps})[0] for s in (1.0, -1.0))
    return (plus - minus) / (2 * eps)


@pytest.mark.parametrize("warm_steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_of_an_unroll(kind: str, warm_steps: int) -> None:
    _, steps, before, optimizer = train(kind, warm_steps, {})
    direction = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    adjoint = ShardAdjoint(direction.clone())
    for i in reversed(range(NUM_STEPS)):
        cotangent = adjoint_of(optimizer)(adjoint, steps[i], before[i], with_settings=True)
        derivatives = {"grad": cotangent, **adjoint.by_setting}
        assert set(derivatives) == {"grad", "lr", "weight_decay"}
        for what, value in derivatives.items():
            expected = direction * by_differences(kind, warm_steps, i, what)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_zero_without_any_gradient(kind: str) -> None:
    zero = torch.zeros(3)
    state = {"exp_avg": zero, "exp_avg_sq": zero, "step": 2.0}
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    adjoint = ShardAdjoint(torch.ones(3))
    optimizer = OPTIMIZERS[kind][0]([torch.zeros(3)])
    value = adjoint_of(optimizer)(adjoint, ShardStep(zero, settings, 0, False, state), None)
    assert torch.equal(value, zero)
    assert torch.equal(adjoint.weight, torch.ones(3))


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping(max_norm: float) -> None:
    grad = torch.randn(6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(6, dtype=torch.float64)
    norm = grad.norm()
    clipped = grad * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    (expected,) = torch.autograd.grad((clipped * cotangent).sum(), grad)
    inner = float(clipped.detach() @ cotangent)
    value = through_clipping(
        cotangent, clipped.detach(), inner, norm=norm.item(), max_norm=max_norm
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_optimizers_without_an_adjoint_are_refused() -> None:
    weight = [torch.zeros(2)]
    with pytest.raises(ValueError, match=r"Adagrad has no adjoint here; use torch\.optim\.SGD"):
        adjoint_of(torch.optim.Adagrad(weight))
    for option in ({"amsgrad": True}, {"maximize": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=True has no adjoint here"):
            adjoint_of(torch.optim.AdamW(weight, **option))
