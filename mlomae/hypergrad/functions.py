"""Tangents of any model's functions, which can be differentiated once more.

In torch 2.13 some tangents are missing (fused attention, `grid_sample`) or wrong (`embedding` with
a padding row). More cannot be backpropagated (softmax and all that is made of it), or have silently
wrong gradients, since the forward rule takes saved statistics or factors for constants (layer norm,
batch norm, `linalg.solve`). Calls of these with dual arguments follow the rules below, which make
tangents of plain differentiable operations: reverse over them is right by construction.
"""

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

Function = Callable[..., Any]


@contextmanager
def differentiable_functions() -> Iterator[None]:
    """Dual tensors get right tangents here, and these tangents right gradients.

    Calls without dual tensors run as they are. `torch.no_grad()` stops tangents as it stops
    gradients, so enter with gradients enabled. Backpropagate here, or after the dual level has
    ended: elsewhere in the level torch pushes tangents through the backward pass, in vain, and
    raises where a backward function has no forward rule.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("tangents stop at no_grad() as gradients do: enable gradients here")
    # ZeRO-3 puts an autograd function there for all the process, which has no forward rule.
    linear = F.linear
    F.linear = torch._C._nn.linear
    try:
        # Compiled code takes a dual tensor for a plain one, and its tangents are silently wrong.
        with torch.compiler.set_stance("force_eager"), _Rules():
            yield
    finally:
        F.linear = linear


def explain(error: BaseException) -> str | None:
    """The sentence about the function whose derivative torch misses; None for other errors."""
    message = str(error)
    if isinstance(error, CheckpointError):
        return "activation checkpointing has no tangent: switch it off for this model"
    if "implement the jvp function for custom autograd.Function" in message:
        frames = [frame.f_locals.get("cls") for frame, _ in traceback.walk_tb(error.__traceback__)]
        name = next((cls.__name__ for cls in frames if isinstance(cls, type)), "a custom function")
        return f"{name} is an autograd.Function without jvp: it has no tangent"
    if match := re.search(r"forward AD with (\S+) that does not support it", message):
        return f"{match[1]} has no tangent: torch has no forward-mode rule for it"
    if match := re.search(r"derivative for '?([\w:.]+)'? is not implemented", message):
        return f"{match[1]} has no derivative: its function cannot be differentiated twice"
    return None


class _Rules(TorchFunctionMode):
    def __init__(self, entered: frozenset[Function] = frozenset()) -> None:
        super().__init__()
        self._entered = entered

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:  # by no_grad() in a model: forward mode overlooks it
            func(*args)
            return torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        if func in (torch.autograd.grad, Tensor.backward):
            return _backward(func, *args, **kwargs)
        rule = _RULES.get(func)
        enters = type(func) is FunctionType and func not in self._entered
        tangents = (_unpack(argument)[1] for argument in (*args, *kwargs.values()))
        if not (rule or enters) or all(tangent is None for tangent in tangents):
            return func(*args, **kwargs)
        if rule:
            return rule(*args, **kwargs)
        # A function written in Python: the functions that it calls have to come by here too.
        with _Rules(self._entered | {func}):
            return _without_dispatch(func)(*args, **kwargs)


def _without_dispatch(func: Any) -> Function:
    """The same function, which does not begin by asking modes whether they take over."""
    asking = "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"
    names = {**func.__globals__, **dict.fromkeys(asking, lambda *_: False)}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _backward(func: Function, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
        if _unpack(output)[1] is not None:
            raise RuntimeError("a model that calls autograd in its forward pass has no tangent")
    with forward_ad._set_fwd_grad_enabled(False):
        return func(outputs, *args, **kwargs)


def _unpack(argument: Any) -> tuple[Any, Any]:
    """Value and tangent; anything but a dual tensor is a value without tangent."""
    if not isinstance(argument, Tensor):
        return argument, None
    return forward_ad.unpack_dual(argument)  # type: ignore[no-untyped-call,no-any-return]


def _join(value: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(value, tangent.to(value.dtype))  # type: ignore


def _is_recorded(*arguments: Any) -> bool:
    """Whether the tangent can be backpropagated; if not, torch's fast rules may serve."""
    parts = [part for a in arguments for part in _unpack(a) if isinstance(part, Tensor)]
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


def _wide(tensor: Tensor) -> Tensor:
    """Statistics are taken in float32 or wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    (x, x_t), (w, w_t), (b, b_t) = map(_unpack, (input, weight, bias))
    value, terms = F.linear(x, w, b), [] if x_t is None else [F.linear(x_t, w)]
    if w_t is not None:
        terms.append(F.linear(x, w_t, b_t))
    elif b_t is not None:
        terms.append(b_t.expand_as(value))
    return _join(value, sum(terms[1:], terms[0]))


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    x, w, b = (_unpack(tensor)[0] for tensor in (input, weight, bias))
    value = F.layer_norm(x, normalized_shape, w, b, eps)
    if _is_recorded(input, weight, bias):
        normed = _normalize(input, list(range(-len(normalized_shape), 0)), eps)
        return _scale(value, normed, weight, bias)
    # The Jacobian of normalization is symmetric: its backward kernel also gives its tangent.
    x, x_t = _unpack(_wide(input))
    normed, *saved = torch.native_layer_norm(x, normalized_shape, None, None, eps)
    if x_t is not None:
        rest = (x, normalized_shape, *saved, None, None, [True, False, False])
        normed = _join(normed, torch.ops.aten.native_layer_norm_backward(x_t, *rest)[0])
    return _scale(value, normed, weight, bias)


def _batch_norm(axes: Callable[[int], list[int]], func: Function) -> Function:
    """The rule of batch norm and of instance norm, which average over different `axes`."""

    def rule(x: Tensor, w: Any, b: Any, mean: Any, var: Any, train: bool, *rest: Any) -> Any:
        if not (train and _is_recorded(x, w, b)):
            return func(x, w, b, mean, var, train, *rest)
        value = func(*(_unpack(tensor)[0] for tensor in (x, w, b)), mean, var, train, *rest)
        w, b = (t if t is None else t.view(-1, *[1] * (x.dim() - 2)) for t in (w, b))
        return _scale(value, _normalize(x, axes(x.dim()), eps=rest[1]), w, b)

    return rule


def _normalize(input: Tensor, axes: list[int], eps: float) -> Tensor:
    variance, mean = torch.var_mean(_wide(input), axes, correction=0, keepdim=True)
    return (_wide(input) - mean) * torch.rsqrt(variance + eps)


def _scale(value: Tensor, normed: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """The value with the tangent of normed * w + b."""
    scaled = normed if w is None else normed * w
    return _join(value, _unpack(scaled if b is None else scaled + b)[1])


def _softmax(input: Tensor, dim: int, dtype: Any = None, func: Function = torch.softmax) -> Tensor:
    x, x_t = _unpack(input)
    y = _wide(value := func(x, dim, dtype))
    return value if x_t is None else _join(value, y * (x_t - (y * x_t).sum(dim, keepdim=True)))


def _log_softmax(input: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x, x_t = _unpack(input)
    value = torch.log_softmax(x, dim, dtype)
    return _join(value, x_t - (_wide(value).exp() * x_t).sum(dim, keepdim=True))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(Q K' / sqrt(d)) V in float32 or wider, as torch's own unfused attention."""
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        query, key, value = (_wide(tensor.to(dtype)) for tensor in (query, key, value))
        if enable_gqa:
            key, value = (
                t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value)
            )
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        func = torch.softmax if attn_mask is None else torch._safe_softmax  # rows without any key
        weights = F.dropout(_softmax(scores, -1, func=func), dropout_p)
        return (weights @ value).to(dtype)


def _embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any) -> Tensor:
    """A padding row has no gradient, so its tangent counts for nothing."""
    if args and args[0]:
        raise RuntimeError("embedding: scale_grad_by_freq=True has no tangent; switch it off")
    w, w_t = _unpack(weight)
    value = torch.embedding(w, indices, padding_idx, *args)
    is_padding = (indices == padding_idx).unsqueeze(-1)
    return _join(value, torch.embedding(w_t, indices).masked_fill(is_padding, 0.0))


def _transposed(func: Function) -> Function:
    """The rule of a function by two reverse passes: J t is the gradient by u of <J'u, t>."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        keep = (lambda t: t) if _is_recorded(*args, *kwargs.values()) else Tensor.detach
        pairs = [_unpack(argument) for argument in (*args, *kwargs.values())]
        with torch.enable_grad():
            values = [
                v if t is None else v.view_as(v) if v.requires_grad else v.detach().requires_grad_()
                for v, t in pairs
            ]
            inputs = {v: t for v, (_, t) in zip(values, pairs, strict=True) if t is not None}
            rest = dict(zip(kwargs, values[len(args) :], strict=True))
            result = func(*values[: len(args)], **rest)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            pushed = _push(outputs, inputs)
        duals = [o if t is None else _join(keep(o), keep(t)) for o, t in pushed]
        return duals[0] if isinstance(result, Tensor) else type(result)(duals)

    return rule


def _push(outputs: list[Tensor], inputs: dict[Tensor, Tensor]) -> list[tuple[Tensor, Any]]:
    """Each output and its tangent; no tangent for indices and the like."""
    smooth = [output for output in outputs if output.requires_grad]
    up = [torch.ones_like(output, requires_grad=True) for output in smooth]  # any would do
    options = {"create_graph": True, "materialize_grads": True}
    down = torch.autograd.grad(smooth, list(inputs), up, **options)
    pushed = iter(torch.autograd.grad(down, up, list(inputs.values()), **options))
    return [(output, next(pushed) if output.requires_grad else None) for output in outputs]


def _refused(name: str) -> Function:
    def rule(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name} has no exact tangent: the model has to do without")

    return rule


def _variants(name: str) -> Iterator[Function]:
    """The functions of a name: `torch.name`, `Tensor.name`, `torch.linalg.name`, operators."""
    places = [torch._C._VariableFunctions, Tensor, torch._C._nn]
    places += [torch._C._linalg, torch._C._special]  # type: ignore[attr-defined]
    for full in (name, f"linalg_{name}", f"special_{name}"):
        functions = (getattr(place, full, None) for place in places)
        yield from (func for func in functions if func and type(func) is not FunctionType)
        if packet := getattr(torch.ops.aten, full, None):
            yield from (packet, *(getattr(packet, overload) for overload in packet.overloads()))


_BY_HAND: dict[str, Function] = {
    "linear": _linear,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm(lambda rank: [0, *range(2, rank)], torch.batch_norm),
    "instance_norm": _batch_norm(lambda rank: [*range(2, rank)], torch.instance_norm),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "hardsigmoid": lambda input: F.relu6(input + 3) / 6,
    "_weight_norm": lambda v, g, dim=0: v * (g / torch.norm_except_dim(v, 2, dim)),
    "cdist": _transposed(lambda a, b, p=2.0, *_: (a.unsqueeze(-2) - b.unsqueeze(-3)).norm(p, -1)),
    "native_layer_norm": _refused("native_layer_norm, unlike layer_norm,"),
    "native_batch_norm": _refused("native_batch_norm, unlike batch_norm,"),
}
_TRANSPOSED = """
    _softmax _log_softmax _safe_softmax logsumexp cross_entropy_loss glu
    norm vector_norm matrix_norm det logdet slogdet solve solve_ex tensorsolve householder_product
    grid_sampler grid_sampler_2d grid_sampler_3d cholesky_inverse scatter_reduce index_reduce
"""
_RULES = {func: rule for name, rule in _BY_HAND.items() for func in _variants(name)}
_RULES |= {func: _transposed(func) for name in _TRANSPOSED.split() for func in _variants(name)}
_RULES[Tensor.register_hook] = _refused("a tensor's register_hook")
