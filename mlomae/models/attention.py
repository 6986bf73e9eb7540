"""Attention on the kernel of one's choice: flash-attn's, PyTorch's fused ones, plain operations.

| backend | kernel | forward mode, double backward |
|---|---|---|
| flash_attn | the flash-attn package; CUDA, float16 and bfloat16 | neither |
| sdpa | `F.scaled_dot_product_attention`, any device and precision | neither |
| math | two products and a softmax, in float32 or wider | both |
| auto | flash_attn where it works, else sdpa | see below |

Tensors with a tangent get `math` whatever was chosen: no fused kernel has a forward-mode rule. That
a backward pass will be differentiated again cannot be known during the forward pass. Say so with
PyTorch's own switch, `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, or choose `math`; without,
the second backward pass raises.
"""

import functools
import logging
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.errors import UserError
from mlomae.models.precision import at_least_float32

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "flash_attn", "sdpa", "math")
FLASH_ATTN_MAX_HEAD_DIM = 256


def attention(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Tensor:
    """softmax(Q K' / sqrt(head_dim)) V; Vaswani et al., arXiv 1706.03762, equation 1.

    Args:
        query, key, value: [B, heads, tokens, head_dim], on one device and in one precision.
        backend: one of `BACKENDS`. What it amounts to is logged once per process.

    Returns:
        [B, heads, tokens, head_dim], in the precision of the arguments.

    Raises:
        UserError: the backend has another name, or is flash_attn and cannot work here.
    """
    is_dual = _is_dual(query, key, value)
    chosen = _choose(backend, is_dual, query.device, query.dtype, query.shape[-1])
    if chosen == "flash_attn":
        return _flash_attention(query, key, value)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(query, key, value)
    return _plain_attention(query, key, value)


def check_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64
) -> None:
    """Whether a backend works there, before anything is built.

    Raises:
        UserError: one sentence on what is missing.
    """
    _check_name(backend)
    if backend == "flash_attn" and (problem := _flash_attn_problem(device, dtype, head_dim)):
        raise UserError(f"model.attention is flash_attn, but {problem}: set it to auto")


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of timm's.

    Serves as `attn_layer` of timm's `Block`. That takes a class and no partial, so `backend` is an
    attribute to set afterwards: `block.attn.backend = "sdpa"`.

    Args:
        options: what else timm's attention knows (norms, dropout); has to be off.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        backend: str = "auto",
        norm_layer: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(
                f"an attention of {num_heads} heads cannot be {dim} wide: make the width a "
                "multiple of the number of heads"
            )
        if wanted := [name for name, value in options.items() if value]:
            raise ValueError(f"this attention has no {' and no '.join(wanted)}")
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, qkv_bias, device, dtype)
        self.proj = nn.Linear(dim, dim, proj_bias, device, dtype)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, tokens, dim] -> [B, tokens, dim]. Every token sees all others: no mask is taken."""
        if attn_mask is not None or is_causal:
            raise ValueError("this attention takes no mask")
        query, key, value = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        )
        mixed = attention(query, key, value, self.backend)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


# Compiled code takes the answer for a constant: nothing in here breaks a graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(
    backend: str, is_dual: bool, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str:
    """The backend that computes: flash_attn, sdpa or math."""
    _check_name(backend)
    if is_dual:
        if backend != "math":
            _say(f"attention {backend}: math for tangents, which fused kernels do not have")
        return "math"
    if backend in ("sdpa", "math"):
        return backend
    if not torch.backends.cuda.flash_sdp_enabled():  # type: ignore[no-untyped-call]
        # By sdpa_kernel(...), for a second backward pass; sdpa heeds it by itself.
        _say(f"attention {backend}: sdpa where PyTorch's own flash kernels are switched off")
        return "sdpa"
    check_backend(backend, device, dtype, head_dim)
    problem = _flash_attn_problem(device, dtype, head_dim)
    _say(f"attention {backend}: " + (f"sdpa, since {problem}" if problem else "flash_attn"))
    return "sdpa" if problem else "flash_attn"


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"attention is {backend}: choose one of {', '.join(BACKENDS)}")


@functools.cache
def _say(sentence: str) -> None:
    """Log a sentence once per process."""
    logger.info(sentence)


def _is_dual(*tensors: Tensor) -> bool:
    # Compiled code has no tangents: who wants them runs it eagerly, see torch.compiler.set_stance.
    if torch.compiler.is_compiling():
        return False
    duals = (forward_ad.unpack_dual(t) for t in tensors)  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def _flash_attn_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn cannot work there, as a clause; None where it can."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA alone and not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"flash-attn computes in bfloat16 or float16 and not in {name}"
    if head_dim > FLASH_ATTN_MAX_HEAD_DIM:
        return f"flash-attn takes heads up to {FLASH_ATTN_MAX_HEAD_DIM} wide and not {head_dim}"
    if problem := _import_problem():
        return problem
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"flash-attn needs an Ampere GPU or a newer one and not {capability}"
    return None


@functools.cache
def _import_problem() -> str | None:
    try:
        import flash_attn  # noqa: F401
    except ModuleNotFoundError:
        return "the flash-attn package is not installed"
    except ImportError as error:  # compiled for another torch
        return f"the flash-attn package cannot be imported ({error})"
    return None


def _flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed: Tensor = flash_attn_func(*rows).transpose(1, 2)
    if not torch.compiler.is_compiling():  # torch itself refuses to differentiate that twice
        mixed = _OnceDifferentiable.apply(mixed)  # type: ignore[no-untyped-call]
    return mixed


class _OnceDifferentiable(torch.autograd.Function):
    """The identity. flash-attn's gradient comes without a graph, and terms would be missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "flash-attn has no second derivative: run the forward pass inside "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or choose attention math"
            )
        return grad


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Widened to float32 as in PyTorch's own unfused attention."""
    q, k, v = (at_least_float32(tensor) for tensor in (query, key, value))
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1)
    return (weights @ v).to(query.dtype)
