"""A level's model without weights of its own: they are fetched when its forward reads them.

Every derivative is taken on twins. A twin runs with the live weights or with recorded ones, with
tangents or without, and hands gradients to a sink that averages them over ranks and keeps shards.
So no engine's forward, backward, hook or counter takes part in a derivative evaluation.

Sharded weights are gathered a bucket at a time. What autograd would save of them is kept as a
reference and gathered again in the backward pass, so memory beyond the shards stays at a bucket.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from mlomae.hypergrad.partition import Partition, Vector

BUCKET_NUMEL = 2**24  # parameters gathered by one collective: two blocks of ViT-B


class GradientSink:
    """Collects whole gradients of one level's weights into a vector, averaged over ranks."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._vector: Vector = []  # made when there is something to add
        self._waiting: dict[str, Tensor] = {}
        self._numel = 0
        self.is_reached = False

    def add(self, name: str, grad: Tensor) -> None:
        """Add this rank's gradient of one parameter. All ranks must call in the same order."""
        self.is_reached = True
        if name in self._waiting:
            self._waiting[name] = self._waiting[name] + grad
            return
        self._waiting[name] = grad
        self._numel += grad.numel()
        if self._numel >= BUCKET_NUMEL:
            self._flush()

    def take(self) -> Vector:
        """The sum of all that was added, handed over. All ranks must call."""
        self._flush()
        vector, self._vector = self._vector, []
        return vector or self._partition.zeros()

    def _flush(self) -> None:
        if self._waiting:
            self._vector = self._vector or self._partition.zeros()
            self._partition.add_gradients(self._waiting, self._vector)
        self._waiting, self._numel = {}, 0


class Twin:
    """A structural copy of a module that shares everything but its weights.

    Attributes:
        root: the copy; it runs inside `bound` only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._weights: Weights | None = None
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._names: dict[int, str] = {}  # tied weights go by the name of their first owner
        for name, param in module.named_parameters():
            self._names[id(param)] = name
        self.root = self._copy(module, {})
        self.buckets = self._find_buckets(module)

    @contextmanager
    def bound(self, weights: "Weights", modes: Sequence[bool] | None = None) -> Iterator[nn.Module]:
        """The twin with weights.

        Args:
            weights: where they come from.
            modes: training mode of every submodule as `modes` gave it; None for the present one.
        """
        for (original, copy), training in zip(self._pairs, modes or self.modes(), strict=True):
            copy.training = training
            # Copies, because a forward pass may change running statistics.
            copy._buffers = {n: b if b is None else b.clone() for n, b in original._buffers.items()}
        self._weights = weights
        try:
            yield self.root
        finally:
            self._weights = None

    def modes(self) -> list[bool]:
        """Training mode of every submodule of the original."""
        return [original.training for original, _ in self._pairs]

    def fetch(self, name: str) -> Tensor:
        """A weight from where the twin is bound to."""
        if self._weights is None:
            raise RuntimeError(f"weight {name} of a twin was read after its evaluation had ended")
        return self._weights[name]

    def _copy(self, module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        copy = module.__new__(type(module))
        copies[id(module)] = copy
        self._pairs.append((module, copy))
        copy.__dict__ = {name: _rebound(v, module, copy) for name, v in module.__dict__.items()}
        copy.__dict__["_compiled_call_impl"] = None
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            copy.__dict__[hooks] = _without_deepspeed(module.__dict__[hooks])
        names = {
            attribute: self._names[id(param)]
            for attribute, param in module._parameters.items()
            if param is not None
        }
        copy.__dict__["_parameters"] = _FetchedParameters(self, module._parameters, names)
        copy.__dict__["_modules"] = {
            name: child if child is None else self._copy(child, copies)
            for name, child in module._modules.items()
        }
        return copy

    def _find_buckets(self, module: nn.Module) -> dict[str, list[str]]:
        """The bucket of each parameter by its name; a submodule's own weights share one."""
        buckets: dict[str, list[str]] = {}
        bucket: list[str] = []
        numel = 0
        for submodule in module.modules():
            if numel >= BUCKET_NUMEL:
                bucket, numel = [], 0
            for param in submodule._parameters.values():
                if param is not None and self._names[id(param)] not in buckets:
                    name = self._names[id(param)]
                    bucket.append(name)
                    buckets[name] = bucket
                    numel += getattr(param, "ds_numel", param.numel())  # empty at ZeRO-3
        return buckets


class _FetchedParameters(dict[str, Any]):
    """Stands for a module's parameters: each is fetched when it is read."""

    def __init__(self, twin: Twin, parameters: dict[str, Any], names: dict[str, str]) -> None:
        super().__init__(dict.fromkeys(parameters))
        self._twin = twin
        self._names = names

    def __getitem__(self, attribute: str) -> Tensor | None:
        name = self._names.get(attribute)
        return None if name is None else self._twin.fetch(name)

    def items(self) -> Any:
        return [(attribute, self[attribute]) for attribute in self]

    def values(self) -> Any:
        return [self[attribute] for attribute in self]

    def get(self, attribute: str, default: Any = None) -> Any:
        return self[attribute] if attribute in self else default  # noqa: SIM401 - this is `get`


def _rebound(value: Any, module: nn.Module, copy: nn.Module) -> Any:
    """A method that was set as an attribute must act on the copy, not on the original."""
    if inspect.ismethod(value) and value.__self__ is module:
        return MethodType(value.__func__, copy)
    return value


def _without_deepspeed(hooks: OrderedDict[int, Any]) -> OrderedDict[int, Any]:
    ours = {k: h for k, h in hooks.items() if not _module_of(h).startswith("deepspeed")}
    return OrderedDict(ours)


def _module_of(hook: Any) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", None))


class Weights:
    """Whole parameters of one level for one evaluation, fetched by name.

    Args:
        twin: the level's twin, for its buckets.
        partition: the level's partition.
        values: recorded weights as shards in compute precision; None for the live ones.
        tangents: a direction as shards in compute precision; None for no tangents.
        sink: takes the gradients; None for constants.
    """

    def __init__(
        self,
        twin: Twin,
        partition: Partition,
        *,
        values: Vector | None = None,
        tangents: Vector | None = None,
        sink: GradientSink | None = None,
    ) -> None:
        self.twin = twin
        self._partition = partition
        self._vectors = [v for v in (values, tangents) if v is not None]
        self._is_live = values is None
        self._has_tangents = tangents is not None
        self._sink = sink
        self._fetched: dict[str, Tensor] = {}
        self._bucket: list[str] = []
        self._values: dict[str, Tensor] = {}  # of the latest bucket
        self._tangents: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._fetched:
            with torch._C.DisableTorchFunction():  # fetching is no part of the model
                self._fetched = {}  # free the old bucket before the new one comes
                self._load(self.twin.buckets[name])
                self._fetched = {n: self._prepare(n) for n in self._bucket}
        return self._fetched[name]

    def _load(self, bucket: list[str]) -> None:
        self._values, self._tangents = {}, {}
        trainable = [name for name in bucket if name in self._partition.shapes]
        frozen = [name for name in bucket if name not in self._partition.shapes]
        gathered = self._partition.gather(trainable, *self._vectors) if self._vectors else []
        if self._has_tangents:
            self._tangents = gathered[-1]
        live = bucket if self._is_live else frozen
        self._values = (self._partition.current(live) if live else {}) | (
            {} if self._is_live else gathered[0]
        )
        self._bucket = bucket

    def _prepare(self, name: str) -> Tensor:
        weight = value = self._values[name]
        tangent = self._tangents.get(name)
        if self._sink is not None and name in self._partition.shapes:
            with torch.enable_grad():  # what is read first without gradients may be read again
                anchor = torch.empty(0, device=value.device, requires_grad=True)
                weight = _Fetch.apply(anchor, value, self._sink, name)  # type: ignore[no-untyped-call]
        if tangent is None:
            return weight
        with torch.enable_grad():
            return forward_ad.make_dual(weight, tangent)  # type: ignore[no-any-return,no-untyped-call]

    def locate(self, tensor: Tensor) -> tuple["Weights", list[str], str, bool] | None:
        """Where a tensor that autograd wants to save can be fetched again from."""
        if not self._partition.is_sharded or tensor._is_zerotensor():  # these have no memory
            return None
        pointer = tensor.untyped_storage().data_ptr()
        for is_tangent, wholes in ((False, self._values), (True, self._tangents)):
            for name, weight in wholes.items():
                if weight.untyped_storage().data_ptr() == pointer:
                    return self, self._bucket, name, is_tangent
        return None

    def storage(self, bucket: list[str], name: str, is_tangent: bool) -> torch.UntypedStorage:
        """The storage of a weight or of its tangent, gathered again if need be."""
        if self._bucket is not bucket:
            self._fetched = {}
            self._load(bucket)
        wholes = self._tangents if is_tangent else self._values
        return wholes[name].untyped_storage()


class _Fetch(torch.autograd.Function):
    """Gives a weight into the graph and takes its gradient out, without a leaf that holds it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, sink: GradientSink, name: str) -> Tensor:
        ctx.sink, ctx.name = sink, name
        # Not a view: forward-mode AD keeps a tangent for the whole base of a view.
        return value.new_empty(0).set_(value)  # type: ignore[call-overload,no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.sink.add(ctx.name, grad)
        return None, None, None, None


@contextmanager
def fetched_again(sources: Sequence[Weights]) -> Iterator[None]:
    """Inside, autograd saves references to gathered weights instead of the weights."""
    with ExitStack() as stack:
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(lambda t: _pack(t, sources), _unpack)
        )
        yield


@contextmanager
def running(
    sources: Mapping[str, Weights], modes: Mapping[str, Sequence[bool]]
) -> Iterator[dict[str, Any]]:
    """Twins of several levels, each with its weights, by level name.

    Args:
        sources: the weights of each level.
        modes: training modes as `Twin.modes` gave them; a level without any has its present ones.
    """
    with ExitStack() as stack:
        stack.enter_context(fetched_again(list(sources.values())))
        yield {
            name: stack.enter_context(weights.twin.bound(weights, modes.get(name)))
            for name, weights in sources.items()
        }


def _pack(tensor: Tensor, sources: Sequence[Weights]) -> Any:
    for source in sources:
        place = source.locate(tensor)
        if place is not None:
            return *place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    # Not itself: an output which its own node saves would keep both alive for ever.
    return tensor.detach()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    source, bucket, name, is_tangent, offset, shape, stride, dtype = packed
    storage = source.storage(bucket, name, is_tangent)
    empty = torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, offset, shape, stride)
