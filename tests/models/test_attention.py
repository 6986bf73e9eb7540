"""Attention on every backend, against numpy and timm, and in every kind of derivative."""

import mlomae  # noqa: F401  fixes torchvision's import, which timm's needs

# isort: split
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mlomae.errors import UserError
from mlomae.hypergrad.functions import differentiable_functions
from mlomae.models.attention import (
    BACKENDS,
    Attention,
    _import_problem,
    _say,
    attention,
    check_backend,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (2, 2, 4, 3)  # batch, heads, tokens, head_dim
EVERYWHERE = ("auto", "sdpa", "math")
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def arguments(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [draw(*shape, seed=seed, dtype=dtype) for seed in range(3)]


@pytest.fixture
def log(caplog) -> Iterator[Any]:
    """What attention says; other tests may have heard its sentences already."""
    _say.cache_clear()
    _import_problem.cache_clear()  # packages come and go here
    caplog.set_level(logging.INFO, logger="mlomae.models.attention")
    yield caplog
    _say.cache_clear()
    _import_problem.cache_clear()


# --- an independent attention ----------------------------------------------------------------


def plain(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One query after the other, and no softmax but exponentials."""
    out = np.zeros(query.shape)
    for b, h, i in np.ndindex(*query.shape[:3]):
        logits = [q_k / np.sqrt(query.shape[3]) for q_k in key[b, h] @ query[b, h, i]]
        powers = np.exp(np.array(logits) - max(logits))
        out[b, h, i] = sum(p * row for p, row in zip(powers, value[b, h], strict=True))
        out[b, h, i] /= powers.sum()
    return out


def plain_gradient(tensors: list[Tensor], up: Tensor) -> list[np.ndarray]:
    """The derivative of <plain, up>, by central differences."""
    values, grads = [t.numpy().copy() for t in tensors], []
    for value in values:
        grad = np.zeros(value.shape)
        for index in np.ndindex(*value.shape):
            before, ends = value[index], []
            for step in (1e-5, -1e-5):
                value[index] = before + step
                ends.append((plain(*values) * up.numpy()).sum())
            value[index] = before
            grad[index] = (ends[0] - ends[1]) / 2e-5
        grads.append(grad)
    return grads


# --- the same numbers everywhere -------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_output_is_that_of_plain_numpy(backend, dtype):
    tensors = arguments(dtype, (2, 3, 7, 8))
    expected = plain(*(t.double().numpy() for t in tensors))
    out = attention(*tensors, backend)
    assert out.dtype == dtype
    tolerance = PRECISION[dtype]
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_gradients_are_those_of_plain_numpy(backend):
    tensors, up = [t.requires_grad_() for t in arguments()], draw(*SHAPE, seed=9)
    grads = torch.autograd.grad(attention(*tensors, backend), tensors, up)
    expected = plain_gradient([t.detach() for t in tensors], up)
    for grad, truth in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad.numpy(), truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_gradients_in_lower_precision(backend, dtype, tolerance):
    check_against_float64(backend, dtype, tolerance, CPU, (2, 3, 50, 32))


def check_against_float64(
    backend: str, dtype: torch.dtype, tolerance: float, device: torch.device, shape: Any
) -> None:
    """Output and gradients against a float64 product, softmax, product on the same values."""
    up = draw(*shape, seed=9, dtype=dtype)

    def results(kernel: Any, wide: bool) -> list[Tensor]:
        tensors = [(t.double() if wide else t.to(device)) for t in arguments(dtype, shape)]
        tensors = [t.requires_grad_() for t in tensors]
        out = kernel(*tensors)
        return [out, *torch.autograd.grad(out, tensors, up.to(out))]

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        powers = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5)
        return torch.einsum("bhij,bhjd->bhid", powers / powers.sum(-1, keepdim=True), v)

    ours = results(lambda *qkv: attention(*qkv, backend), wide=False)
    for value, truth in zip(ours, results(composed, wide=True), strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(
            value.double().cpu(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item()
        )


# --- the module ------------------------------------------------------------------------------


def blocks(backend: str) -> tuple[nn.Module, nn.Module]:
    """A timm block with our attention, and one of timm's own with the same weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"qkv_bias": True, "dtype": torch.float64}
    ours, theirs = Block(24, 3, attn_layer=Attention, **options), Block(24, 3, **options)
    ours.attn.backend = backend
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_timms(bias):
    ours, theirs = (
        layer(24, num_heads=3, qkv_bias=bias, proj_bias=bias).state_dict()
        for layer in (Attention, timm.layers.Attention)
    )
    assert [(n, v.shape) for n, v in ours.items()] == [(n, v.shape) for n, v in theirs.items()]
    assert ("qkv.bias" in ours) == bias


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_block_computes_what_timms_block_does(backend):
    x = draw(2, 7, 24, seed=4)
    results = []
    for block in blocks(backend):
        out = block(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in block.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_activation_checkpointing_changes_nothing(backend):
    block, _ = blocks(backend)
    x, gradients = draw(2, 7, 24, seed=4), []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(run(x).square().sum(), list(block.parameters())))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_compiled_block_is_one_graph_with_the_same_gradients(backend, log):
    block, _ = blocks(backend)
    x, gradients = draw(2, 7, 24, seed=4), []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        _say.cache_clear()  # the log is read while the graph is made, and does not break it
        gradients.append(torch.autograd.grad(run(x).square().sum(), list(block.parameters())))
    for ours, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, ours, rtol=1e-10, atol=1e-10)
    assert len(log.messages) == (2 if backend == "auto" else 0)


@pytest.mark.parametrize("option", ["qk_norm", "attn_drop", "proj_drop"])
def test_options_which_it_does_not_have_are_refused(option):
    with pytest.raises(ValueError, match=f"this attention has no {option}"):
        Block(24, 3, attn_layer=Attention, norm_layer=nn.LayerNorm, **{option: 0.5})
    with pytest.raises(UserError, match="5 heads cannot be 24 wide"):
        Attention(24, num_heads=5)


def test_masks_are_refused():
    with pytest.raises(ValueError, match="takes no mask"):
        Attention(24, 3)(torch.zeros(1, 5, 24), attn_mask=torch.ones(5, 5))


# --- derivatives beyond the first ------------------------------------------------------------


def second_differences(tensors: list[Tensor], along: list[Tensor], up: Tensor) -> list[np.ndarray]:
    """The change of `plain_gradient` along a direction, by central differences."""
    ends = []
    for step in (1e-3, -1e-3):
        moved = [t + step * a for t, a in zip(tensors, along, strict=True)]
        ends.append(plain_gradient(moved, up))
    return [(a - b) / 2e-3 for a, b in zip(*ends, strict=True)]


def double_backward(backend: str, tensors: list[Tensor], along: list[Tensor], up: Tensor) -> Any:
    tensors = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(attention(*tensors, backend), tensors, up, create_graph=True)
    slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True))
    return torch.autograd.grad(slope, tensors)


SMALL = (1, 2, 3, 2)
POINT = (arguments(shape=SMALL), [draw(*SMALL, seed=s) for s in (5, 6, 7)], draw(*SMALL, seed=9))


@pytest.fixture(scope="module")
def truth() -> list[np.ndarray]:
    return second_differences(*POINT)


def test_math_can_be_differentiated_twice(truth):
    for ours, expected in zip(double_backward("math", *POINT), truth, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_fused_kernels_do_not_guess_a_second_derivative(backend, truth):
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        double_backward(backend, *POINT)
    with sdpa_kernel(SDPBackend.MATH):
        gradients = double_backward(backend, *POINT)
    for ours, expected in zip(gradients, truth, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_are_those_of_plain_numpy(backend):
    tensors, along, _ = POINT
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, a) for t, a in zip(tensors, along, strict=True)]
        tangent = forward_ad.unpack_dual(attention(*duals, backend)).tangent
    ends = [
        plain(*((t + s * a).numpy() for t, a in zip(tensors, along, strict=True)))
        for s in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose(tangent.numpy(), (ends[0] - ends[1]) / 2e-5, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("which", range(3))
def test_one_tangent_is_enough_to_be_noticed(which):
    tensors = arguments(torch.float32)
    with forward_ad.dual_level():
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones(SHAPE))
        assert forward_ad.unpack_dual(attention(*tensors)).tangent is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_tangents_are_right_in_the_tangent_pass(backend, truth):
    """As mlomae.hypergrad forms products with second derivatives."""
    tensors, along, up = POINT
    tensors = [t.clone().requires_grad_() for t in tensors]
    with forward_ad.dual_level(), differentiable_functions():
        duals = [forward_ad.make_dual(t, a) for t, a in zip(tensors, along, strict=True)]
        tangent = forward_ad.unpack_dual(attention(*duals, backend)).tangent
    gradients = torch.autograd.grad(tangent, tensors, up)
    for ours, expected in zip(gradients, truth, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


# --- what auto chooses, and says -------------------------------------------------------------


def test_choice_is_said_once(log):
    for _ in range(2):
        attention(*arguments(torch.float32))
        attention(*arguments(torch.bfloat16))
    assert log.messages == [
        "attention auto: sdpa, since flash-attn runs on CUDA alone and not on cpu"
    ]


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_nothing_is_said_about_what_was_asked_for(backend, log):
    attention(*arguments(), backend)
    assert log.messages == []


@pytest.mark.parametrize("backend", ["auto", "flash_attn", "sdpa"])
def test_tangents_are_said_once(backend, log):
    with forward_ad.dual_level():
        tensors = [forward_ad.make_dual(t, t) for t in arguments()]
        for _ in range(2):
            attention(*tensors, backend)
    assert log.messages == [
        f"attention {backend}: math for tangents, which fused kernels do not have"
    ]


class FlashAttn(ModuleType):
    """In the place of the package: the same function, which notes its calls."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[torch.Size] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, tokens, heads, head_dim]; gradients come without a graph."""
        self.calls.append(q.shape)
        return _WithoutGraph.apply(q, k, v)


class _WithoutGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        ctx.save_for_backward(*qkv)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        qkv = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv))
        return torch.autograd.grad(out, qkv, up.detach().transpose(1, 2))


@pytest.fixture
def flash_attn(monkeypatch) -> FlashAttn:
    """flash-attn is installed, and the GPU is an Ampere."""
    package = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    return package


def on_gpu(backend: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 4) -> torch.Size:
    """Attention on tensors without contents that say they are on a GPU."""
    with FakeTensorMode():
        tensors = [torch.empty(2, 3, 5, head_dim, dtype=dtype, device=CUDA) for _ in range(3)]
        return attention(*tensors, backend).shape


@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_flash_attn_has_its_own_layout(backend, flash_attn, log):
    assert on_gpu(backend) == (2, 3, 5, 4)
    assert flash_attn.calls == [(2, 5, 3, 4)]
    assert log.messages == [f"attention {backend}: flash_attn"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "flash-attn computes in bfloat16 or float16 and not in float32"),
        ({"head_dim": 264}, "flash-attn takes heads up to 256 wide and not 264"),
    ],
)
def test_what_flash_attn_cannot_do(changes, reason, flash_attn, log):
    assert on_gpu("auto", **changes)[:3] == (2, 3, 5)
    assert log.messages == [f"attention auto: sdpa, since {reason}"]
    with pytest.raises(UserError, match=f"is flash_attn, but {reason}: set it to auto"):
        on_gpu("flash_attn", **changes)
    assert flash_attn.calls == []


def test_an_older_gpu(flash_attn, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    on_gpu("auto")
    assert log.messages[0].endswith("flash-attn needs an Ampere GPU or a newer one and not (7, 5)")


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "the flash-attn package is not installed"),
        ("import no_such_symbol_of_torch", "the flash-attn package is not installed"),
        ("raise ImportError('undefined symbol: x')", "cannot be imported (undefined symbol: x)"),
    ],
)
def test_flash_attn_that_is_missing_or_broken(package, reason, log, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if package is None:
        monkeypatch.setitem(sys.modules, "flash_attn", None)  # type: ignore[arg-type]
    else:
        (tmp_path / "flash_attn.py").write_text(package)
        monkeypatch.syspath_prepend(tmp_path)
    assert on_gpu("auto") == (2, 3, 5, 4)
    assert len(log.messages) == 1 and log.messages[0].endswith(reason)
    with pytest.raises(UserError, match="set it to auto"):
        check_backend("flash_attn", CUDA, torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_pytorchs_switch_holds_for_flash_attn_too(backend, flash_attn, log):
    with sdpa_kernel(SDPBackend.MATH):
        assert on_gpu(backend) == (2, 3, 5, 4)
    assert flash_attn.calls == []
    sentence = "sdpa where PyTorch's own flash kernels are switched off"
    assert log.messages == [f"attention {backend}: {sentence}"]


@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_flash_attn_differentiated_twice_raises(backend, flash_attn, monkeypatch):
    """Its backward pass leaves no graph: the missing terms would not be noticed."""
    module = sys.modules[attention.__module__]
    monkeypatch.setattr(module, "_flash_attn_problem", lambda *_: None)
    tensors, up = [t.requires_grad_() for t in arguments()], draw(*SHAPE, seed=9)
    grads = torch.autograd.grad(attention(*tensors, backend), tensors, up)
    for grad, expected in zip(grads, plain_gradient(arguments(), up), strict=True):
        np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(RuntimeError, match="flash-attn has no second derivative"):
        double_backward(backend, *POINT)


def test_bad_backends_are_refused_before_anything_runs():
    check_backend("auto", CPU, torch.float32)
    with pytest.raises(UserError, match=r"is flash: choose one of auto, flash_attn, sdpa, math$"):
        check_backend("flash", CPU, torch.float32)
    with pytest.raises(UserError, match="attention is fast: choose one of"):
        attention(*arguments(), "fast")
    with pytest.raises(UserError, match="runs on CUDA alone and not on cpu: set it to auto"):
        attention(*arguments(), "flash_attn")


# --- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_in_bfloat16(backend, head_dim):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    check_against_float64(backend, torch.bfloat16, 3e-2, CUDA, (2, 3, 197, head_dim))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_gpu_compiled_block_is_one_graph(backend):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    block = blocks(backend)[0].to(CUDA, torch.bfloat16)
    x = draw(2, 7, 24, seed=4, dtype=torch.bfloat16).to(CUDA)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=3e-2, atol=3e-2)
