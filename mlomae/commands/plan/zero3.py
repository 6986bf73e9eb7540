"""ZeRO stage 3 on tensors without memory."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlomae.commands.plan.engines import BUFFERS, GATHERED, PlannedEngine


class PlannedZero3(PlannedEngine):
    """Stage 3: every weight is cut; whole ones are gathered when a module needs them."""

    def shard(self) -> None:
        world_size, wrapper = dist.get_world_size(), self.optimizer
        wrapper.fp16_groups, wrapper.offload_optimizer = self.groups, False
        wrapper.grad_position, wrapper.get_param_id = {}, id
        wrapper.fp32_partitioned_groups_flat = []
        for index, params in enumerate(self.groups):
            sizes = [math.ceil(param.numel() / world_size) for param in params]
            with self.ledger.part(self.weights):
                flat = torch.empty(sum(sizes), dtype=self.dtype, device="meta")
            with self.ledger.part(self.optimizer_part):  # a copy in fp32, too
                master = nn.Parameter(flat.detach().to(torch.float32, copy=True))
            self.basic_optimizer.param_groups[index]["params"] = [master]
            wrapper.fp32_partitioned_groups_flat.append(master)
            start = 0
            for param, size in zip(params, sizes, strict=True):
                self._cut(param, flat[start : start + size])
                wrapper.grad_position[id(param)] = (index, start, size)
                start += size
        total = sum(param.ds_tensor.numel() for param in self.params)
        with self.ledger.part(self.gradients):
            wrapper.grad_partitions_flat_buffer = torch.empty(
                total, dtype=self.dtype, device="meta"
            )
        with self.ledger.part(BUFFERS):
            self._bucket = torch.empty(
                self.zero.reduce_bucket_size, dtype=self.dtype, device="meta"
            )
        self._waiting: list[Any] = []
        self._gathering = Gathering(self)

    def watch(self) -> None:
        self._gathering.watch()

    def _cut(self, param: Any, piece: Tensor) -> None:
        param.ds_shape, param.ds_numel, param.ds_tensor = param.shape, param.numel(), piece
        param.ds_process_group, param.partition_numel = None, piece.numel
        param.ds_persist = param.numel() <= self.zero.param_persistence_threshold
        param.is_whole = False

    def on_gradient(self, param: Any) -> None:
        self._mark(param)
        with self.ledger.part(BUFFERS):
            numel = sum(p.ds_numel for p in self._waiting)
            if self._waiting and numel + param.ds_numel > self.zero.reduce_bucket_size:
                self.reduce()
                numel = 0
            if numel + param.ds_numel <= self.zero.reduce_bucket_size:
                place = self._bucket[numel : numel + param.ds_numel]
                param.grad.data = place.view(param.ds_shape)
            self._waiting.append(param)
        self._gathering.release(param)

    def reduce(self) -> None:
        if self._waiting:
            world_size = dist.get_world_size()
            numel = sum(p.ds_tensor.numel() for p in self._waiting)
            together = torch.empty(world_size * numel, dtype=self.dtype, device="meta")
            dist.reduce_scatter_tensor(together[:numel], together)
        for param in self._waiting:
            param.grad = None
        self._waiting = []

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        buffer, start = self.optimizer.grad_partitions_flat_buffer, 0
        for index, params in enumerate(self.groups):
            sizes = [param.ds_tensor.numel() for param in params]
            end = start + sum(sizes)
            self.optimizer.averaged_gradients[index] = list(buffer[start:end].split(sizes))
            start = end

    def take_step(self) -> None:
        self._gathering.release_all()
        wrapper = self.optimizer
        for index, master in enumerate(wrapper.fp32_partitioned_groups_flat):
            flat = torch.cat(wrapper.averaged_gradients[index])
            master.grad = flat.to(torch.float32)
            wrapper.averaged_gradients[index] = None
            del flat
            self.run_optimizer([self.basic_optimizer.param_groups[index]])
            master.grad = None
        self._gathering.gather([param for param in self.params if param.ds_persist])


class Gathering:
    """Which weights are whole: DeepSpeed's fetching, once it knows the order of use."""

    def __init__(self, engine: PlannedZero3) -> None:
        self._engine, self._zero = engine, engine.zero
        modules = engine.module.modules()
        self._order: list[Any] = [p for m in modules for p in m.parameters(recurse=False)]
        self._ahead: list[Any] = []  # fetched, but not needed yet: in one flat buffer
        self._flat: Tensor | None = None
        with engine.ledger.part(None):
            for param in engine.params:
                param.data = torch.empty(0, dtype=engine.dtype, device="meta")

    def watch(self) -> None:
        """Gather for every module from now on."""
        for module in self._engine.module.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after)

    def gather(self, params: list[Any]) -> None:
        """Whole weights, out of one collective."""
        params = [param for param in params if not param.is_whole]
        if params:
            flat = self._collect(params)
            self._unpack(params)
            del flat

    def _before(self, module: nn.Module, *_: Any) -> None:
        params = list(module.parameters(recurse=False))
        if any(param is ahead for param in params for ahead in self._ahead):
            self._unpack(self._ahead)
            self._ahead, self._flat = [], None
        self.gather(params)
        if not self._ahead:
            self._fetch_ahead(params[-1])

    def _fetch_ahead(self, last: Any) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        order = self._order[::-1] if is_backward else self._order
        here = next(i for i, param in enumerate(order) if param is last)
        numel = 0
        for param in order[here + 1 :]:
            if numel >= self._zero.prefetch_bucket_size:
                break
            if not param.is_whole:
                self._ahead.append(param)
                numel += param.ds_numel
        self._flat = self._collect(self._ahead) if self._ahead else None

    def _collect(self, params: list[Any]) -> Tensor:
        numel = sum(param.ds_tensor.numel() for param in params)
        with self._engine.ledger.part(BUFFERS):
            flat: Tensor = params[0].new_empty(numel * dist.get_world_size())
            dist.all_gather_into_tensor(flat, flat[:numel])
        return flat

    def _unpack(self, params: list[Any]) -> None:
        for param in params:
            with self._engine.ledger.part(GATHERED):
                param.data = param.new_empty(param.ds_shape)
            param.is_whole = True

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        for tensor in tree_leaves(output):  # of a whole model it may be a dictionary
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: self._before(module)
                )
        if torch._C._current_graph_task_id() != -1:  # recomputed for the backward pass
            return
        params = list(module.parameters(recurse=False))
        here = next(i for i, param in enumerate(self._order) if param is params[-1])
        until_again = 2 * sum(param.ds_numel for param in self._order[here + 1 :])
        if until_again >= self._zero.max_reuse_distance:
            for param in params:
                self.release(param)

    def release(self, param: Any) -> None:
        """Free a whole weight that is not to stay."""
        if not param.ds_persist:
            with self._engine.ledger.part(None):
                param.data = torch.empty(0, dtype=self._engine.dtype, device="meta")
            param.is_whole = False

    def release_all(self) -> None:
        """Free all of them."""
        self._ahead, self._flat = [], None
        for param in self._order:
            self.release(param)
