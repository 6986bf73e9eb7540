"""How each ZeRO stage cuts a model's weights into shards, and how to read and gather them.

A `Vector` in weight space is a list of flat tensors, one for each tensor that the inner optimizer
steps. At stages 1 to 3 these are this rank's shards, so a vector costs 1/N of the weights on each
of N ranks and elementwise work on it needs no communication.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

Vector = list[Tensor]


@dataclass(frozen=True)
class Fragment:
    """The contiguous part of one parameter that lies in one of this rank's shards.

    Attributes:
        param: the module's parameter (in compute precision; empty at ZeRO-3).
        name: its qualified name in the module.
        shard: index into a `Vector`.
        shard_start: first element inside the shard.
        param_start: first element inside the flattened parameter.
        numel: number of elements.
    """

    param: nn.Parameter
    name: str
    shard: int
    shard_start: int
    param_start: int
    numel: int


class Partition(ABC):
    """One model's weights as the inner optimizer of its engine sees them.

    Attributes:
        optimizer: the torch optimizer whose `step` changes the weights.
        device: where the model computes; with offload, shards lie elsewhere.
        params, frozen: the module's parameters that are trained and that are not, by name.
        dtype: what the model computes in.
        fragments: what this rank owns, in the module's parameter order.
        shapes: full shape of every trainable parameter, by name.
        is_sharded: whether ranks own different fragments (else each owns everything).
    """

    is_sharded: bool

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        self.dtype = next(iter(self.params.values())).dtype
        self.shapes = {name: self.full_shape(p) for name, p in self.params.items()}
        self.fragments = list(self.find_fragments())

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by until the optimizer's step; not 1 under fp16 only."""
        return 1.0

    def full_shape(self, param: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter."""
        return param.shape

    @abstractmethod
    def find_fragments(self) -> Iterable[Fragment]:
        """This rank's fragments."""

    @abstractmethod
    def shards(self) -> Sequence[Tensor]:
        """The tensors that the inner optimizer steps, in the order of a `Vector`."""

    @abstractmethod
    def set_gradient(self, vector: Vector) -> None:
        """Make the next step use exactly this as the reduced gradient, before clipping.

        What was accumulated before is forgotten. All ranks must call.
        """

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget every gradient, so that the next backward pass starts from nothing."""

    def weights_of(self, fragment: Fragment) -> Tensor:
        """The fragment's weights in compute precision, flat."""
        start = fragment.param_start
        return fragment.param.detach().flatten()[start : start + fragment.numel]

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        """The fragment's gradient times `loss_scale`, averaged, flat; None when there is none."""
        grad = fragment.param.grad
        if grad is None:
            return None
        return grad.detach().flatten()[fragment.param_start :][: fragment.numel]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that the model computes with those in the shards. All ranks must call.

        For shards that were written from outside; an optimizer step does it by itself.
        """
        masters = [shard.detach().flatten() for shard in self.shards()]
        for name, param in self.params.items():
            param.copy_(self.gather([name], masters)[0][name])

    @torch.no_grad()
    def set_frozen(self, name: str, value: Tensor) -> None:
        """Give a parameter that is not trained another value, whole and alike on all ranks."""
        self.frozen[name].copy_(value)

    def zeros(self) -> Vector:
        """A vector of zeros."""
        return [torch.zeros_like(s, requires_grad=False).flatten() for s in self.shards()]

    def weights(self) -> Vector:
        """A copy of the weights in compute precision."""
        vector = [zeros.to(self.dtype) for zeros in self.zeros()]
        for fragment in self.fragments:
            view(vector, fragment).copy_(self.weights_of(fragment))
        return vector

    def dot(self, left: Vector, right: Vector) -> float:
        """Inner product over all shards and ranks, in float64. All ranks must call."""
        total = torch.zeros((), dtype=torch.float64, device=left[0].device)
        for fragment in self.fragments:  # not whole shards: their padding may hold anything
            total += (view(left, fragment).double() * view(right, fragment).double()).sum()
        return self._sum_over_ranks(total)

    def gradient_norm(self) -> float:
        """Global 2-norm of the reduced gradient, before clipping. All ranks must call."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for fragment in self.fragments:
            grad = self.gradient_of(fragment)
            if grad is not None:
                total += _squared_norm(grad).to(self.device)
        return math.sqrt(self._sum_over_ranks(total)) / self.loss_scale

    def current(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole parameters in compute precision as they are now, trainable or frozen, by name.

        At ZeRO-3 they are gathered by one collective, so all ranks must call; else they are the
        live tensors, and show what the next step does to them.
        """
        params = self.params | self.frozen
        return {name: params[name].detach() for name in names}

    @torch.no_grad()
    def add_gradients(self, grads: Mapping[str, Tensor], into: Vector) -> None:
        """Average whole gradients over ranks in fp32 or wider, and add this rank's part of them.

        One collective. All ranks must call with the same names in the same order.

        Args:
            grads: this rank's gradient of each parameter by its name.
            into: the vector to add to.
        """
        dtype = torch.promote_types(into[0].dtype, torch.float32)
        parts = [grad.flatten().to(self.device, dtype) for grad in grads.values()]
        offsets = dict(zip(grads, running_sum([part.numel() for part in parts]), strict=True))
        mean = self.average(torch.cat(parts))
        for fragment in self.fragments:
            if fragment.name in offsets:
                start = offsets[fragment.name] + fragment.param_start
                part = mean[start : start + fragment.numel]
                target = view(into, fragment)
                target += part.to(target.device)

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks that see different data, in place. All ranks must call."""
        return tensor

    def gather(self, names: Sequence[str], *vectors: Vector) -> list[dict[str, Tensor]]:
        """Whole parameters out of vectors, in their memory where they are whole. All ranks call.

        Sharded ones take one collective for each vector. Each vector gets memory of its own, all
        laid out alike: a tangent joins its value without a copy only if both lie alike in theirs.

        Args:
            names: parameters to assemble.
            vectors: vectors in weight space.

        Returns:
            For each vector, a tensor of the parameter's shape by name.
        """
        if not self.is_sharded:  # nothing to assemble
            whole = {f.name: f for f in self.fragments if f.name in names}
            return [
                {name: alias(view(vector, whole[name]), 0, self.shapes[name]) for name in names}
                for vector in vectors
            ]
        sizes = [self.shapes[name].numel() for name in names]
        offsets = dict(zip(names, running_sum(sizes), strict=True))
        wholes = []
        for vector in vectors:
            flat = torch.zeros(sum(sizes), dtype=vector[0].dtype, device=self.device)
            for fragment in self.fragments:
                if fragment.name in offsets:
                    start = offsets[fragment.name] + fragment.param_start
                    flat[start : start + fragment.numel].copy_(view(vector, fragment))
            dist.all_reduce(flat)  # fragments do not overlap, so this sum is exact
            wholes.append({name: alias(flat, offsets[name], self.shapes[name]) for name in names})
        return wholes

    def _sum_over_ranks(self, value: Tensor) -> float:
        value = value.to(self.device)  # shards may be offloaded, where collectives cannot reach
        if self.is_sharded:
            dist.all_reduce(value)
        return float(value)


class PlainPartition(Partition):
    """A module with a torch optimizer in one process: every parameter is its own shard."""

    is_sharded = False

    def find_fragments(self) -> Iterable[Fragment]:
        index = {id(p): i for i, p in enumerate(self.shards())}
        for name, param in self.params.items():
            if id(param) not in index:
                raise ValueError(
                    f"parameter {name} is trainable but not in the optimizer; "
                    "add it or set requires_grad=False"
                )
            yield Fragment(param, name, index[id(param)], 0, 0, param.numel())

    def shards(self) -> Sequence[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_gradient(self, vector: Vector) -> None:
        for fragment in self.fragments:
            param = fragment.param
            param.grad = view(vector, fragment).to(param, copy=True).view(param.shape)

    def clear_gradients(self) -> None:
        for param in self.params.values():
            param.grad = None


def view(vector: Vector, fragment: Fragment) -> Tensor:
    """The slice of a vector that holds a fragment."""
    return vector[fragment.shard][fragment.shard_start : fragment.shard_start + fragment.numel]


def running_sum(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def alias(flat: Tensor, start: int, shape: torch.Size) -> Tensor:
    """A part of a flat tensor in its memory, but not a view of it.

    Forward-mode AD keeps a tangent for the whole base of every view that gets one.
    """
    offset = flat.storage_offset() + start
    strides = torch.empty(shape, device="meta").stride()
    return flat.new_empty(0).set_(flat.untyped_storage(), offset, shape, strides)


def _squared_norm(flat: Tensor, width: int = 1024) -> Tensor:
    """Sum of squares in float64, of rows in their own precision: nothing wide is copied."""
    precision = torch.promote_types(flat.dtype, torch.float32)
    num_whole = flat.numel() // width * width
    rows = torch.linalg.vector_norm(flat[:num_whole].reshape(-1, width), dim=1, dtype=precision)
    rest = torch.linalg.vector_norm(flat[num_whole:], dtype=torch.float64)
    total: Tensor = rows.double().square().sum() + rest.square()
    return total
