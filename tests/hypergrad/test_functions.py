"""Each function's tangent and the gradient of it, against first-order reverse mode in float64.

No reference uses torch's second-order formulas: the tangent is <gradient, direction>, and the
gradient of the tangent is the central difference of the gradient along the direction.
"""

import re
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mlomae.hypergrad.functions import differentiable_functions, explain
from tests.hypergrad.function_cases import CASES, INDEX, LABELS, Function


def run(function: Function, tensors: Sequence[Tensor]) -> Tensor:
    torch.manual_seed(7)  # the same dropout every time
    return function(*tensors)


def dual(function: Function, points: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return run(function, list(map(forward_ad.make_dual, points, directions)))


def gradient(function: Function, points: Sequence[Tensor], up: Tensor) -> list[Tensor]:
    leaves = [point.detach().requires_grad_() for point in points]
    total = (run(function, leaves) * up).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def close(values: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-6) -> bool:
    values, expected = (torch.cat([t.flatten() for t in ts]) for ts in (values, expected))
    return bool((values - expected).norm() <= rtol * (expected.norm() + 1.0))


@pytest.mark.filterwarnings("ignore:reduction.*mean:UserWarning")  # of kl_div
@pytest.mark.parametrize("name", CASES)
def test_tangent_and_its_gradient(name: str) -> None:
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    points, directions = ([0.7 * random(shape) for shape in shapes] for _ in range(2))
    value = run(function, points).detach()
    up = random(value.shape)
    grads = gradient(function, points, up)
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    step = 1e-5
    ahead, behind = (
        gradient(function, [p + s * d for p, d in zip(points, directions, strict=True)], up)
        for s in (step, -step)
    )
    differences = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    with forward_ad.dual_level(), differentiable_functions():
        output = forward_ad.unpack_dual(dual(function, points, directions))
    assert close([output.primal], [value], 1e-12)
    assert close([(output.tangent * up).sum()], [expected])

    leaves = [tensor.clone().requires_grad_() for tensor in (*points, *directions)]
    with forward_ad.dual_level(), differentiable_functions():
        tangent = forward_ad.unpack_dual(
            dual(function, leaves[: len(points)], leaves[len(points) :])
        ).tangent
        total = (tangent * up).sum()
        slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
    assert close([total], [expected])
    assert close(slopes[: len(points)], differences)
    assert close(slopes[len(points) :], grads)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_calls_without_duals_are_the_fused_ones() -> None:
    x = torch.randn(1, 2, 4, 8)
    with forward_ad.dual_level(), differentiable_functions():
        with Operators() as plain:
            F.layer_norm(F.scaled_dot_product_attention(x, x, x), (8,))
        with Operators() as of_duals:
            F.scaled_dot_product_attention(x, x, forward_ad.make_dual(x, x))
    assert "native_layer_norm" in plain.names and "_softmax" not in plain.names
    assert any("flash_attention" in name for name in plain.names)
    assert not any("flash_attention" in name for name in of_duals.names)


class Doubled(torch.autograd.Function):
    """Takes no part in forward mode, like ZeRO-3's linear."""

    @staticmethod
    def forward(ctx: object, x: Tensor, *_: object) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, up: Tensor) -> Tensor:
        return 2 * up


def test_nothing_stays_behind_and_nesting(monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(x: Tensor, weight: Tensor) -> Tensor:  # as ZeRO-3 does it
        return Doubled.apply(x, weight)

    monkeypatch.setattr(F, "linear", replaced)
    x, weight, direction = torch.randn(3, 2, 2).double()
    with forward_ad.dual_level():
        with differentiable_functions(), differentiable_functions():
            output = nn.functional.linear(x, forward_ad.make_dual(weight, direction)).softmax(-1)
            tangent = forward_ad.unpack_dual(output).tangent
        assert F.linear is replaced
        with pytest.raises(RuntimeError), differentiable_functions():
            raise RuntimeError
        assert F.linear is replaced
        assert torch.overrides._get_current_function_mode_stack() == []
    y = (x @ weight.T).softmax(-1)
    pushed = x @ direction.T
    assert close([tangent], [y * (pushed - (y * pushed).sum(-1, keepdim=True))], 1e-12)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(recorded: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    x, direction = 30 + torch.randn(2, 1, 2, 8, 64)  # a mean that bfloat16 could not subtract
    x, direction = x.bfloat16(), direction.bfloat16()

    def function(x: Tensor) -> Tensor:
        normed = F.layer_norm(x, (64,))
        attended = F.scaled_dot_product_attention(normed, normed, normed)
        return F.log_softmax(attended, -1) + F.softmax(attended, -1)

    with forward_ad.dual_level(), differentiable_functions():
        exact = forward_ad.unpack_dual(
            function(forward_ad.make_dual(x.double(), direction.double()))
        )
        with torch.autocast("cpu", enabled=autocast):
            plain = function(x)
            point = x.float() if autocast else x
            leaf = direction.to(point.dtype).requires_grad_(recorded)
            output = forward_ad.unpack_dual(function(forward_ad.make_dual(point, leaf)))
    assert output.tangent.requires_grad == recorded
    assert output.primal.dtype == output.tangent.dtype
    assert autocast or output.tangent.dtype == plain.dtype == torch.bfloat16
    assert close([output.primal.double()], [exact.primal], 0.01)
    assert close([output.tangent.double()], [exact.tangent], 0.02)


def test_no_grad_stops_tangents_as_it_stops_gradients() -> None:
    x, direction = torch.randn(2, 5).double()

    @torch.no_grad()
    def frozen(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.softmax(x, 0)
        with torch.enable_grad():
            return scale * x.square()

    def function(x: Tensor) -> Tensor:
        return (frozen(x) * x + x.detach() * x).sum()

    (grad,) = gradient(function, [x], torch.ones(()).double())
    for needs_grad in (False, True):
        leaf = x.clone().requires_grad_(needs_grad)
        with forward_ad.dual_level(), differentiable_functions():
            tangent = forward_ad.unpack_dual(
                function(forward_ad.make_dual(leaf, direction))
            ).tangent
        assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()
        assert close([tangent], [grad @ direction])
    with pytest.raises(RuntimeError, match="enable gradients"), torch.no_grad():
        differentiable_functions().__enter__()


def test_running_statistics_move_as_in_training() -> None:
    x = torch.randn(8, 3, requires_grad=True)
    norms = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    norms[0](x)
    with forward_ad.dual_level(), differentiable_functions():
        norms[1](forward_ad.make_dual(x, x.detach()))
    assert torch.equal(norms[0].running_var, norms[1].running_var)
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: torch.native_layer_norm(x, (3,), None, None, 1e-5)[0], "unlike layer_norm"),
        (lambda x: F.embedding(INDEX, x, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda x: torch.autograd.grad(x.sum(), x)[0], "in its forward pass"),
        (lambda x: x.register_hook(print), "register_hook has no exact tangent"),
        (F.pdist, "^_pdist_forward has no tangent"),
        (lambda x: F.multi_margin_loss(x, LABELS), "^multi_margin_loss has no tangent"),
        (Doubled.apply, "^Doubled is an autograd.Function without jvp"),
        (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), "^activation checkpointing"),
    ],
)
def test_what_has_no_tangent_says_so(function: Function, message: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with (
        pytest.raises((RuntimeError, NotImplementedError)) as caught,
        forward_ad.dual_level(),
        differentiable_functions(),
    ):
        forward_ad.unpack_dual(
            function(forward_ad.make_dual(x, x.detach()))
        ).tangent.sum().backward()
    sentence = explain(caught.value) or str(caught.value)
    assert re.search(message, sentence), sentence
    assert explain(ValueError("another matter")) is None
