"""The tangent pass and the optimizer adjoints, each against reverse-mode autograd in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.hypergrad import Level, adamw_cotangent, clipping_cotangent, sgd_cotangent, tangent


class Small(nn.Module):
    """A tied weight, a buffer, a parameter of the root, and layers with traps in forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6, eps=1e-6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x * self.scale) + self.shift)))


def small_level(optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> Level:
    torch.manual_seed(0)
    module = Small().double()
    return Level(module, optimizer(module.parameters(), lr=0.1), template=twin())


def twin() -> nn.Module:
    with torch.device("meta"):  # `.to("meta")` would untie the weights
        return Small()


def recorded(level: Level, x: Tensor) -> tuple[dict[str, Tensor], object]:
    """The weights before a recorded step, and its record."""
    params = level.partition.params
    before = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    loss = functional(level, before, x).square().sum()
    for name, grad in zip(before, torch.autograd.grad(loss, list(before.values())), strict=True):
        params[name].grad = grad
    with level.recording() as record:
        level.optimizer.step()
    return before, record


def functional(level: Level, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    scale = torch.linspace(0.5, 1.5, 6).double()
    hidden = torch.tanh(F.linear(x * scale, weights["first.weight"], weights["first.bias"])
                        + weights["shift"])  # fmt: skip
    mean = hidden.mean(-1, keepdim=True)
    deviation = ((hidden - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = (hidden - mean) / deviation * weights["norm.weight"] + weights["norm.bias"]
    return F.linear(normed, weights["first.weight"], weights["second.bias"])


@pytest.mark.parametrize("bucket_numel", [1, 2**24])
def test_derivative_and_its_gradient_equal_double_backward(
    monkeypatch: pytest.MonkeyPatch, bucket_numel: int
) -> None:
    monkeypatch.setattr(tangent, "BUCKET_NUMEL", bucket_numel)
    level = small_level()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    before, record = recorded(level, x)
    direction = [torch.randn_like(shard).flatten() for shard in level.partition.shards()]

    loss = functional(level, before, x).square().sum()
    grads = torch.autograd.grad(loss, list(before.values()), create_graph=True)
    # The plain partition orders a vector as the optimizer does, which is the module's order.
    reference = sum((g.flatten() * d).sum() for g, d in zip(grads, direction, strict=True))
    (reference_grad,) = torch.autograd.grad(reference, x)

    leaf = x.detach().requires_grad_()
    with level.tangent(record, direction) as open_pass:
        output = open_pass.module(leaf)
        value = open_pass.of_loss(lambda y: y.square().sum(), output)
        through_output = open_pass.of(output.square().sum())
        (value_grad,) = torch.autograd.grad(value, leaf)
    assert torch.allclose(value, reference, rtol=1e-12)
    assert torch.allclose(through_output, reference, rtol=1e-12)
    # torch's fused layer norm would be wrong here by tens of percent.
    assert torch.allclose(value_grad, reference_grad, rtol=1e-10, atol=1e-12)


def test_nothing_stays_behind() -> None:
    level = small_level()
    x = torch.randn(5, 6, dtype=torch.float64)
    _, record = recorded(level, x)
    functions = F.linear, F.layer_norm
    with level.tangent(record, level.partition.zeros()) as open_pass:
        dual = open_pass.module
        assert torch.equal(open_pass.of(dual(x)), torch.zeros(5, 6).double())  # zero direction
        assert F.layer_norm is not functions[1]
    assert (F.linear, F.layer_norm) == functions
    assert not any("weight" in module.__dict__ for module in dual.modules())
    assert not list(dual.parameters()) and not any(m._forward_hooks for m in dual.modules())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_sgd_cotangent(momentum: float, nesterov: bool, num_steps: int) -> None:
    if nesterov and not momentum:
        pytest.skip("torch refuses nesterov without momentum")
    settings = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov}
    adjoint = torch.randn(4, dtype=torch.float64)
    expected = by_differences(torch.optim.SGD, settings | {"weight_decay": 0.1}, num_steps, adjoint)
    value = sgd_cotangent(adjoint, **settings, first_step=num_steps == 1)
    assert torch.allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_adamw_cotangent(num_steps: int) -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-2}
    adjoint = torch.randn(4, dtype=torch.float64)
    optimizer_class, extra = torch.optim.AdamW, {"weight_decay": 0.1}
    expected = by_differences(optimizer_class, settings | extra, num_steps, adjoint)
    weight, optimizer, grad = stepped(optimizer_class, settings | extra, num_steps, 0.0)
    state = optimizer.state[weight]
    value = adamw_cotangent(
        adjoint, grad, state["exp_avg"], state["exp_avg_sq"], step=num_steps, **settings
    )
    assert torch.allclose(value, expected, rtol=1e-5)


def test_adamw_cotangent_is_zero_without_any_gradient() -> None:
    zero = torch.zeros(3)
    value = adamw_cotangent(
        torch.ones(3), zero, zero, zero, lr=0.1, betas=(0.9, 0.95), eps=1e-8, step=2
    )
    assert torch.equal(value, zero)


def stepped(
    optimizer_class: type[torch.optim.Optimizer], settings: dict, num_steps: int, shift: Tensor
) -> tuple[Tensor, torch.optim.Optimizer, Tensor]:
    """A weight after fixed gradients, the last of them shifted."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, generator=generator, dtype=torch.float64)
    optimizer = optimizer_class([weight], **settings)
    for i in range(num_steps):
        grad = torch.randn(4, generator=generator, dtype=torch.float64)
        weight.grad = grad + shift if i == num_steps - 1 else grad
        optimizer.step()
    return weight, optimizer, weight.grad


def by_differences(
    optimizer_class: type[torch.optim.Optimizer], settings: dict, num_steps: int, adjoint: Tensor
) -> Tensor:
    """Central differences of torch's own optimizer, which acts on each element by itself."""
    eps = 1e-6
    plus, minus = (
        stepped(optimizer_class, settings, num_steps, torch.full((4,), s * eps))[0]
        for s in (1.0, -1.0)
    )
    return adjoint * (plus - minus) / (2 * eps)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_cotangent(max_norm: float) -> None:
    grad = torch.randn(6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(6, dtype=torch.float64)
    norm = grad.norm()
    clipped = grad * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    (expected,) = torch.autograd.grad((clipped * cotangent).sum(), grad)
    inner = float(clipped.detach() @ cotangent)
    value = clipping_cotangent(
        cotangent, clipped.detach(), inner, norm=norm.item(), max_norm=max_norm
    )
    assert torch.allclose(value, expected, rtol=1e-12)


def test_misuse_is_refused_with_the_mend() -> None:
    module = Small()
    parameters = list(module.parameters())
    with pytest.raises(ValueError, match="Adagrad has no adjoint here; use"):
        small_level(torch.optim.Adagrad)
    with pytest.raises(ValueError, match="amsgrad=True has no adjoint here; switch it off"):
        amsgrad = torch.optim.AdamW(parameters, amsgrad=True)
        Level(module, amsgrad, template=twin())
    with pytest.raises(ValueError, match="differ in the trainable parameter bias"):
        Level(module, torch.optim.SGD(parameters, lr=1.0), template=nn.Linear(6, 6, device="meta"))
    with pytest.raises(ValueError, match="bias is trainable but not in the optimizer"):
        Level(module, torch.optim.SGD([module.shift, module.first.weight], lr=1.0))
    with pytest.raises(ValueError, match="a plain module needs its optimizer"):
        Level(module)

    level = small_level()
    with level.recording() as record:
        pass
    with pytest.raises(RuntimeError, match="no optimizer step was taken"):
        level.cotangent(record, level.partition.zeros())
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(2,\)"):
        level.pull_back(torch.ones(2, requires_grad=True))
    without_template = Level(module, torch.optim.SGD(parameters, lr=1.0))
    with (
        pytest.raises(RuntimeError, match="needs a template"),
        without_template.tangent(record, []),
    ):
        pass
