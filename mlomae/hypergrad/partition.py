"""How each ZeRO stage cuts a model's weights into shards, and how to read and gather them.

A `Vector` in weight space is a list of flat tensors, one for each tensor that the inner optimizer
steps. At stages 1 to 3 these are this rank's shards, so a vector costs 1/N of the weights on each
of N ranks and elementwise work on it needs no communication.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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
        self.shapes = {name: self.full_shape(p) for name, p in self.params.items()}
        self.fragments = list(self.find_fragments())

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
    def backward(self, loss: Tensor) -> None:
        """Backpropagate and reduce over ranks, without a step and without loss scaling."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget every gradient, so that the next backward pass starts from nothing."""

    def weights_of(self, fragment: Fragment) -> Tensor:
        """The fragment's weights in compute precision, flat."""
        start = fragment.param_start
        return fragment.param.detach().flatten()[start : start + fragment.numel]

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        """The fragment's gradient, averaged over ranks, flat; None when there is none."""
        grad = fragment.param.grad
        if grad is None:
            return None
        return grad.detach().flatten()[fragment.param_start :][: fragment.numel]

    def zeros(self) -> Vector:
        """A vector of zeros."""
        return [torch.zeros_like(s, requires_grad=False).flatten() for s in self.shards()]

    def weights(self) -> Vector:
        """A copy of the weights in compute precision."""
        dtype = next(iter(self.params.values())).dtype
        vector = [zeros.to(dtype) for zeros in self.zeros()]
        for fragment in self.fragments:
            view(vector, fragment).copy_(self.weights_of(fragment))
        return vector

    def gradient(self) -> Vector:
        """A copy of the reduced gradient; zero where there is none."""
        vector = self.zeros()
        for fragment in self.fragments:
            grad = self.gradient_of(fragment)
            if grad is not None:
                view(vector, fragment).copy_(grad)
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
                total += grad.float().square().sum(dtype=torch.float64).to(self.device)
        return math.sqrt(self._sum_over_ranks(total))

    def gather(self, names: Sequence[str], *vectors: Vector) -> list[dict[str, Tensor]]:
        """Whole parameters out of sharded vectors, with one collective. All ranks must call.

        Args:
            names: parameters to assemble.
            vectors: vectors of one dtype.

        Returns:
            For each vector, a tensor of the parameter's shape by name.
        """
        sizes = [self.shapes[name].numel() for name in names]
        offsets = dict(zip(names, _running_sum(sizes), strict=True))
        dtype = vectors[0][0].dtype
        buffer = torch.zeros(len(vectors), sum(sizes), dtype=dtype, device=self.device)
        for row, vector in zip(buffer, vectors, strict=True):
            for fragment in self.fragments:
                if fragment.name in offsets:
                    start = offsets[fragment.name] + fragment.param_start
                    row[start : start + fragment.numel].copy_(view(vector, fragment))
        if self.is_sharded:
            dist.all_reduce(buffer)  # fragments do not overlap, so this sum is exact
        return [
            {name: _alias(row, offsets[name], self.shapes[name]) for name in names}
            for row in buffer
        ]

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

    def backward(self, loss: Tensor) -> None:
        self.clear_gradients()  # what an earlier step left would add to this loss's gradient
        loss.backward()  # type: ignore[no-untyped-call]

    def clear_gradients(self) -> None:
        for param in self.params.values():
            param.grad = None


class _EnginePartition(Partition):
    """What all DeepSpeed engines share: backward at a forced accumulation boundary."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        super().__init__(engine.module, engine.basic_optimizer, engine.device)

    def backward(self, loss: Tensor) -> None:
        engine = self.engine
        boundary = engine._is_gradient_accumulation_boundary
        engine.set_gradient_accumulation_boundary(True)
        try:
            engine.backward(loss, scale_wrt_gas=False)
        finally:
            engine.set_gradient_accumulation_boundary(boundary)

    def clear_gradients(self) -> None:
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()


class Zero0Partition(_EnginePartition):
    """Stage 0: whole parameters on every rank, with fp32 copies of them under bf16."""

    is_sharded = False

    def find_fragments(self) -> Iterable[Fragment]:
        wrapper = self.engine.optimizer
        groups = getattr(wrapper, "fp16_groups", None)  # this wrapper serves bf16, too
        if groups is None:
            groups = [group["params"] for group in self.optimizer.param_groups]
        flat = [param for group in groups for param in group]
        names = {id(param): name for name, param in self.params.items()}
        for index, param in enumerate(flat):
            yield Fragment(param, names[id(param)], index, 0, 0, param.numel())

    def shards(self) -> Sequence[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Zero12Partition(_EnginePartition):
    """Stages 1 and 2: whole parameters on every rank, optimizer shards cut from flat groups."""

    is_sharded = True

    def find_fragments(self) -> Iterable[Fragment]:
        for name, param in self.params.items():
            mapping = param._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                master, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Fragment(
                    param,
                    name,
                    mapping.param_group_index,
                    master.start,
                    whole.start,
                    whole.numel,
                )

    def shards(self) -> Sequence[Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        grads = self.engine.optimizer.averaged_gradients.get(fragment.shard)
        if grads is None:
            return None
        grad: Tensor = grads[fragment.param._index_in_param_group]  # type: ignore[attr-defined]
        return grad.detach().flatten()

    def backward(self, loss: Tensor) -> None:
        optimizer = self.engine.optimizer
        counter = optimizer.micro_step_id
        super().backward(loss)
        optimizer.micro_step_id = counter

    def clear_gradients(self) -> None:
        super().clear_gradients()
        # In place: `safe_get_full_grad` reads this very dictionary.
        averaged = self.engine.optimizer.averaged_gradients
        for group in averaged:
            averaged[group] = None


class Zero3Partition(_EnginePartition):
    """Stage 3: parameters, gradients and optimizer state are all cut alike."""

    is_sharded = True

    def full_shape(self, param: nn.Parameter) -> torch.Size:
        return torch.Size(param.ds_shape)  # type: ignore[attr-defined]

    def find_fragments(self) -> Iterable[Fragment]:
        wrapper = self.engine.optimizer
        for name, param in self.params.items():
            shard, start, size = wrapper.grad_position[wrapper.get_param_id(param)]
            first = dist.get_rank(param.ds_process_group) * size  # type: ignore[attr-defined]
            numel = max(0, min(size, self.shapes[name].numel() - first))  # the rest is padding
            if numel:
                yield Fragment(param, name, shard, start, first, numel)

    def shards(self) -> Sequence[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def weights_of(self, fragment: Fragment) -> Tensor:
        shard: Tensor = fragment.param.ds_tensor  # type: ignore[attr-defined]
        return shard.detach().flatten()[: fragment.numel]

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        from deepspeed.utils import safe_get_local_grad

        grad: Tensor = safe_get_local_grad(fragment.param)
        return grad.detach().flatten()[: fragment.numel]

    def backward(self, loss: Tensor) -> None:
        # A parameter that this loss does not reach keeps what the last step left in the buffer.
        self._zero_buffers()
        super().backward(loss)

    def clear_gradients(self) -> None:
        super().clear_gradients()
        self._zero_buffers()

    def _zero_buffers(self) -> None:
        wrapper = self.engine.optimizer
        if not wrapper.offload_optimizer:
            wrapper.grad_partitions_flat_buffer.zero_()
            return
        for shard in self.shards():
            if shard.grad is not None:
                shard.grad.zero_()


def partition_of(model: Any, optimizer: torch.optim.Optimizer | None) -> Partition:
    """The partition of a plain module with its optimizer, or of a DeepSpeed engine.

    Raises:
        ValueError: the engine uses something that cannot be read exactly; names it.
    """
    if optimizer is not None:
        return PlainPartition(model, optimizer, next(model.parameters()).device)
    if not hasattr(model, "zero_optimization_stage"):
        raise ValueError("a plain module needs its optimizer: Level(module, optimizer, ...)")
    if model.fp16_enabled():
        raise ValueError(
            "fp16 loss scaling is not supported by hypergradients; enable bf16 instead"
        )
    if type(model.optimizer).__name__ == "BF16_Optimizer":
        raise ValueError(
            "data_types.grad_accum_dtype=fp32 at ZeRO stage 1 is not supported by hypergradients; "
            "remove it or use stage 2"
        )
    if model.zero_cpu_offload() and int(model.zero_optimization_stage()) < 3:
        raise ValueError(
            "zero_optimization.offload_optimizer at ZeRO stage 1 or 2 is not supported by "
            "hypergradients; remove it or use stage 3"
        )
    stage = int(model.zero_optimization_stage())
    if stage == 0:
        return Zero0Partition(model)
    return Zero3Partition(model) if stage == 3 else Zero12Partition(model)


def view(vector: Vector, fragment: Fragment) -> Tensor:
    """The slice of a vector that holds a fragment."""
    return vector[fragment.shard][fragment.shard_start : fragment.shard_start + fragment.numel]


def _running_sum(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _alias(flat: Tensor, start: int, shape: torch.Size) -> Tensor:
    """A part of a flat tensor in its memory, but not a view of it.

    Forward-mode AD keeps a tangent for the whole base of every view that gets one.
    """
    offset = flat.storage_offset() + start
    strides = torch.empty(shape, device="meta").stride()
    return flat.new_empty(0).set_(flat.untyped_storage(), offset, shape, strides)
