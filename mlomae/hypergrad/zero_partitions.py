"""How DeepSpeed's engines cut weights into shards, and where they keep gradients, by ZeRO stage.

`partition_of` chooses the partition of any model, engine or plain module.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.hypergrad.partition import Fragment, Partition, PlainPartition, Vector, alias, view


class _EnginePartition(Partition):
    """What all DeepSpeed engines share."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        super().__init__(engine.module, engine.basic_optimizer, engine.device)

    @property
    def loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def set_gradient(self, vector: Vector) -> None:
        self.clear_gradients()
        gradient = self.zeros()  # also in the padding, which `vector` may fill with anything
        for fragment in self.fragments:
            view(gradient, fragment).copy_(view(vector, fragment)).mul_(self.loss_scale)
        self.hand_over(gradient)
        self._close_accumulation()

    @abstractmethod
    def hand_over(self, gradient: Vector) -> None:
        """Put a gradient, which is the caller's no longer, where the optimizer's step reads it."""

    def clear_gradients(self) -> None:
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()
        self._open_accumulation()

    def average(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor.div_(dist.get_world_size())

    def _close_accumulation(self) -> None:
        """Let the next `engine.step()` step, as after the last of a step's micro-batches."""
        engine, num_micro_batches = self.engine, self.engine.gradient_accumulation_steps()
        if engine._is_gradient_accumulation_boundary is None:  # the engine counts by itself
            engine.micro_steps += -(engine.micro_steps + 1) % num_micro_batches
        else:
            engine.set_gradient_accumulation_boundary(True)

    def _open_accumulation(self) -> None:
        """Go back to before the first of a step's micro-batches."""
        if self.engine._is_gradient_accumulation_boundary is None:
            self.engine.micro_steps -= (
                self.engine.micro_steps % self.engine.gradient_accumulation_steps()
            )


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

    def hand_over(self, gradient: Vector) -> None:
        for fragment in self.fragments:
            param = fragment.param
            param.grad_dtype = None  # else a bf16 parameter refuses the exact fp32 gradient
            param.grad = view(gradient, fragment).view(param.shape)


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
        return grad.detach().flatten()[: fragment.numel]

    def hand_over(self, gradient: Vector) -> None:
        for index, flat in enumerate(gradient):
            # One piece for each parameter, in the order of `_index_in_param_group`.
            starts = sorted(f.shard_start for f in self.fragments if f.shard == index)
            self.engine.optimizer.averaged_gradients[index] = list(flat.tensor_split(starts[1:]))

    def clear_gradients(self) -> None:
        super().clear_gradients()
        wrapper = self.engine.optimizer
        wrapper.micro_step_id = -1  # as after a step: the next gradient is the first of its step
        for group in wrapper.averaged_gradients:
            # In place: `safe_get_full_grad` reads this very dictionary.
            wrapper.averaged_gradients[group] = wrapper.all_grad_tensors[group] = None


class Zero12OffloadPartition(Zero12Partition):
    """Stages 1 and 2 with the optimizer's shards and their gradients in host memory."""

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        wrapper = self.engine.optimizer
        wrapper._wait_for_offload_copies()
        if wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads:
            return None
        return view([shard.grad for shard in self.shards()], fragment)  # type: ignore[misc]

    def hand_over(self, gradient: Vector) -> None:
        wrapper = self.engine.optimizer
        for shard, flat in zip(self.shards(), gradient, strict=True):
            shard.grad.copy_(flat)  # type: ignore[union-attr]
        for fragment in self.fragments:
            norm = view(gradient, fragment).norm()
            wrapper.norm_for_param_grads[wrapper.get_param_id(fragment.param)] = norm
        wrapper.local_overflow = not all(bool(flat.isfinite().all()) for flat in gradient)

    def clear_gradients(self) -> None:
        super().clear_gradients()
        self.engine.optimizer.reset_cpu_buffers()
        for shard in self.shards():
            shard.grad.zero_()  # type: ignore[union-attr]


class Bf16Partition(Zero12Partition):
    """Stage 1 with fp32 gradients of bf16 weights: each rank holds them whole.

    DeepSpeed's `BF16_Optimizer` takes their norm from all of them on every rank.
    """

    def shards(self) -> Sequence[Tensor]:
        return list(self.engine.optimizer.fp32_groups_flat_partition)

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        index = fragment.param._index_in_param_group  # type: ignore[attr-defined]
        if not self.engine.optimizer.fp32_groups_has_gradients[fragment.shard][index]:
            return None
        grad: Tensor = self.engine.optimizer.fp32_groups_gradients[fragment.shard][index]
        return grad[fragment.param_start :][: fragment.numel]

    def hand_over(self, gradient: Vector) -> None:
        wrapper = self.engine.optimizer
        for index, flat in enumerate(gradient):
            dist.all_gather_into_tensor(wrapper.fp32_groups_gradients_flat[index], flat)
            num_params = len(wrapper.fp32_groups_has_gradients[index])
            wrapper.fp32_groups_has_gradients[index] = [True] * num_params

    def clear_gradients(self) -> None:
        _EnginePartition.clear_gradients(self)  # has none of stage 1's usual buffers


class Zero3Partition(_EnginePartition):
    """Stage 3: parameters, gradients and optimizer state are all cut alike."""

    is_sharded = True

    def full_shape(self, param: nn.Parameter) -> torch.Size:
        return torch.Size(param.ds_shape)  # type: ignore[attr-defined]

    def find_fragments(self) -> Iterable[Fragment]:
        wrapper = self.engine.optimizer
        self._indices = {id(p): i for group in wrapper.fp16_groups for i, p in enumerate(group)}
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

    @torch.no_grad()
    def refresh(self) -> None:
        masters = [shard.detach() for shard in self.shards()]
        for fragment in self.fragments:
            self.weights_of(fragment).copy_(view(masters, fragment))
        # Small parameters stay whole on every rank from one step to the next.
        if whole := self.engine.optimizer.persistent_parameters:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    @torch.no_grad()
    def set_frozen(self, name: str, value: Tensor) -> None:
        param: Any = self.frozen[name]
        size = param.ds_tensor.numel()
        part = value.flatten()[dist.get_rank(param.ds_process_group) * size :][:size]
        param.ds_tensor.flatten()[: len(part)].copy_(part)
        if param.data.numel() == value.numel():  # small, so it stays whole on every rank
            param.data.copy_(value)

    def current(self, names: Sequence[str]) -> dict[str, Tensor]:
        params = self.params | self.frozen
        shapes = [self.full_shape(params[name]) for name in names]
        parts = [params[n].ds_tensor.detach().flatten() for n in names]  # type: ignore[attr-defined]
        local = torch.cat([part.to(self.device) for part in parts])
        gathered = local.new_empty(dist.get_world_size() * local.numel())
        dist.all_gather_into_tensor(gathered, local)
        wholes = torch.split(
            gathered.view(-1, local.numel()), [part.numel() for part in parts], dim=1
        )
        return {
            name: alias(torch.cat(list(whole)), 0, shape)
            for name, whole, shape in zip(names, wholes, shapes, strict=True)
        }

    def gradient_of(self, fragment: Fragment) -> Tensor | None:
        wrapper = self.engine.optimizer
        if wrapper.offload_optimizer:
            if wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads:
                return None
            return view([shard.grad for shard in wrapper.fp32_partitioned_groups_flat], fragment)
        grads = wrapper.averaged_gradients.get(fragment.shard)
        if grads is None:
            return None
        grad: Tensor = grads[self._indices[id(fragment.param)]]
        return grad.detach().flatten()[: fragment.numel]

    def hand_over(self, gradient: Vector) -> None:
        wrapper = self.engine.optimizer
        for index, (flat, params) in enumerate(zip(gradient, wrapper.fp16_groups, strict=True)):
            pieces = torch.split(flat, [param.partition_numel() for param in params])
            if wrapper.offload_optimizer:
                wrapper.fp32_partitioned_groups_flat[index].grad.copy_(flat)
                for param, piece in zip(params, pieces, strict=True):
                    norm = wrapper._constant_buffered_norm2(piece)
                    wrapper.norm_for_param_grads[wrapper.get_param_id(param)] = norm
            else:
                wrapper.averaged_gradients[index] = list(pieces)

    def clear_gradients(self) -> None:
        super().clear_gradients()
        wrapper = self.engine.optimizer
        # A parameter that a loss does not reach would keep what it has there.
        wrapper.grad_partitions_flat_buffer.zero_()
        wrapper.averaged_gradients = {}
        if wrapper.offload_optimizer:
            wrapper.reset_cpu_buffers()
            for shard in wrapper.fp32_partitioned_groups_flat:
                shard.grad.zero_()


def engine_partition(engine: Any) -> Partition:
    """The partition of a DeepSpeed engine.

    Raises:
        ValueError: the engine uses something that cannot be read exactly; names it.
    """
    for what, is_used, fix in _unsupported(engine):
        if is_used:
            raise ValueError(f"{what} is not supported by hypergradients; {fix}")
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        return Zero0Partition(engine)
    if stage == 3:
        return Zero3Partition(engine)
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        return Bf16Partition(engine)
    return (Zero12OffloadPartition if engine.zero_cpu_offload() else Zero12Partition)(engine)


def _unsupported(engine: Any) -> Iterable[tuple[str, bool, str]]:
    """What is unsupported, whether the engine uses it, and the fix."""
    zero, stage = engine._config.zero_config, int(engine.zero_optimization_stage())
    # DeepSpeed 0.19.8 divides gradients there by a scale that it never multiplied the loss by.
    yield "fp16 at ZeRO stage 0", engine.fp16_enabled() and stage == 0, "use another stage or bf16"
    # It halves the gradient, unnoticed, in a step at which it doubles its scale.
    is_dynamic = engine.fp16_enabled() and engine.dynamic_loss_scale()
    yield "dynamic fp16 loss scaling", is_dynamic, "set fp16.loss_scale"
    yield "torch_autocast", engine.torch_autocast_enabled(), "use bf16"
    offloads = [part.device for part in (zero.offload_optimizer, zero.offload_param) if part]
    yield "offload to nvme", "nvme" in offloads, "offload to cpu"
    yield "zero_hpz_partition_size", zero.zero_hpz_partition_size > 1, "remove it"
    unmanaged = not engine.managed_gradient_accumulation()
    yield "managed_gradient_accumulation=false", unmanaged, "remove it"
    if stage in (1, 2):
        # With them, what DeepSpeed says of where a weight lies in the shards is wrong or lacks.
        yield "round_robin_gradients", zero.round_robin_gradients, "remove it"
        yield "parameter_alignment", zero.parameter_alignment, "remove it"


def partition_of(model: Any, optimizer: torch.optim.Optimizer | None) -> Partition:
    """The partition of a plain module with its optimizer, or of a DeepSpeed engine.

    Raises:
        ValueError: a plain module came without its optimizer, or the engine uses something that
            cannot be read exactly; names it.
    """
    if optimizer is not None:
        return PlainPartition(model, optimizer, next(model.parameters()).device)
    if not hasattr(model, "zero_optimization_stage"):
        raise ValueError("a plain module needs its optimizer: Level(module, optimizer, ...)")
    return engine_partition(model)
