"""The tangent pass: a forward pass whose weights are dual numbers.

A copy of the module without parameters runs forward. Before each submodule its weights and their
tangents are set as dual tensors, after it they are dropped. They are gathered from the shards a
bucket of submodules at a time, so memory beyond the shards stays at one bucket or one submodule,
whichever is larger, and no hook of an engine runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Gather = Callable[[Sequence[str]], list[dict[str, Tensor]]]

BUCKET_NUMEL = 2**24  # parameters gathered by one collective: two blocks of ViT-B


class DualModule:
    """A parameter-less copy of a module, to be run with weights that come from elsewhere.

    Args:
        template: the same architecture, built apart (best on the `meta` device). Its parameters
            are removed for good.
        module: the real module, whose buffers are shared.
    """

    def __init__(self, template: nn.Module, module: nn.Module) -> None:
        self.module = template
        self.owners: list[tuple[nn.Module, dict[str, str]]] = []
        self.buckets: dict[str, list[str]] = {}  # the bucket of each parameter, by its name
        first_name: dict[int, str] = {}  # tied weights go by the name of their first owner
        bucket: list[str] = []
        bucket_numel = 0
        for prefix, submodule in template.named_modules():
            names = {}
            if bucket_numel >= BUCKET_NUMEL:
                bucket, bucket_numel = [], 0
            for attribute, param in list(submodule._parameters.items()):
                if param is not None:
                    full = f"{prefix}.{attribute}" if prefix else attribute
                    names[attribute] = first_name.setdefault(id(param), full)
                    del submodule._parameters[attribute]
                    if names[attribute] == full:
                        bucket.append(full)
                        bucket_numel += param.numel()
                        self.buckets[full] = bucket
            if names:
                self.owners.append((submodule, names))
        self.names = {name for _, names in self.owners for name in names.values()}
        for name, buffer in module.named_buffers():
            owner, _, attribute = name.rpartition(".")
            template.get_submodule(owner)._buffers[attribute] = buffer

    @contextmanager
    def running(self, gather: Gather) -> Iterator[nn.Module]:
        """The module with dual weights; tangents can be unpacked until the context ends.

        Args:
            gather: given parameter names, returns their values and their tangents by name.
        """
        with ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            # Fused attention has no forward-mode rule.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_differentiable_functions())
            weights = _Weights(gather, self.buckets)
            for submodule, names in self.owners:
                for handle in _hook(submodule, names, weights):
                    stack.callback(handle.remove)
            yield self.module


class _Weights:
    """Dual parameters by name, gathered a bucket at a time; only the latest bucket is kept."""

    def __init__(self, gather: Gather, buckets: dict[str, list[str]]) -> None:
        self._gather = gather
        self._buckets = buckets
        self._values: dict[str, Tensor] = {}
        self._tangents: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            self._values, self._tangents = {}, {}  # free the old bucket before the new one comes
            self._values, self._tangents = self._gather(self._buckets[name])
        dual: Tensor = forward_ad.make_dual(  # type: ignore[no-untyped-call]
            self._values[name], self._tangents[name]
        )
        return dual


def _hook(submodule: nn.Module, names: dict[str, str], weights: _Weights) -> Iterator[Any]:
    def attach(*_: Any) -> None:
        for attribute, name in names.items():
            submodule.__dict__[attribute] = weights[name]

    def drop(*_: Any) -> None:
        for attribute in names:
            submodule.__dict__.pop(attribute, None)

    yield submodule.register_forward_pre_hook(attach)
    yield submodule.register_forward_hook(drop, always_call=True)


@contextmanager
def _differentiable_functions() -> Iterator[None]:
    # ZeRO-3 replaces `linear` for the whole process by one that has no forward-mode rule, and the
    # tangent of torch's fused layer norm has a wrong gradient (torch 2.13: it takes the saved mean
    # and deviation for constants).
    linear, layer_norm = F.linear, F.layer_norm
    F.linear, F.layer_norm = torch._C._nn.linear, _layer_norm
    try:
        yield
    finally:
        F.linear, F.layer_norm = linear, layer_norm


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm` out of simple operations, in float32 or wider."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    axes = tuple(range(-len(normalized_shape), 0))
    variance, mean = torch.var_mean(input.to(wide), dim=axes, correction=0, keepdim=True)
    output = (input.to(wide) - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        output = output * weight.to(wide)
    if bias is not None:
        output = output + bias.to(wide)
    return output.to(input.dtype)


def unpack(output: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent of an output of the tangent pass; a zero tangent when it has none."""
    dual = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
    return dual.primal, torch.zeros_like(dual.primal) if dual.tangent is None else dual.tangent
