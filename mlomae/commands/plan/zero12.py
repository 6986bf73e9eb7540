"""ZeRO stages 1 and 2 on tensors without memory."""

import math
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.commands.plan.engines import BUFFERS, PlannedEngine, buckets

ALIGNMENT = 2  # elements times ranks to which a group is padded


class PlannedZero12(PlannedEngine):
    """Stages 1 and 2: flat groups, of which each rank steps one slice."""

    def shard(self) -> None:
        self._bucket: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._numel = self._side = 0
        self._owned: Tensor | None = None
        self._shares: list[Any] = []
        self.optimizer.single_partition_of_fp32_groups = []
        for index, params in enumerate(self.groups):
            self._flatten(index, params)

    def _flatten(self, index: int, params: list[Tensor]) -> None:
        world_size = dist.get_world_size()
        unit = ALIGNMENT * world_size
        numel = math.ceil(sum(p.numel() for p in params) / unit) * unit
        with self.ledger.part(self.weights):
            flat = torch.empty(numel, dtype=self.dtype, device="meta")
        with self.ledger.part(self.optimizer_part):
            share = nn.Parameter(torch.empty(numel // world_size, device="meta"))
        self.basic_optimizer.param_groups[index]["params"] = [share]
        self.optimizer.single_partition_of_fp32_groups.append(share)
        mine: list[Tensor] = []
        start = 0
        for param in params:
            end = start + param.numel()
            param.data = flat[start:end].view(param.shape)
            if start < share.numel():  # this is rank 0, whose slice is the first
                param._index_in_param_group = len(mine)  # type: ignore[attr-defined]
                mine.append(param)
            mapping = _mapping(index, start, end, share.numel())
            param._hp_mapping = mapping  # type: ignore[attr-defined]
            start = end
        self._shares.append(SimpleNamespace(flat=flat, share=share, mine=mine))

    def on_gradient(self, param: Tensor) -> None:
        self._mark(param)
        with self.ledger.part(BUFFERS):
            if not self._bucket:
                sides = 2 if self.zero.overlap_comm else 1
                numel = self.zero.reduce_bucket_size
                self._bucket = [param.new_empty(numel) for _ in range(sides)]
            if self.zero.stage == 2 or (
                self.zero.overlap_comm and self._is_gradient_accumulation_boundary
            ):
                self._put_into_bucket(param)

    def _put_into_bucket(self, param: Tensor) -> None:
        assert param.grad is not None
        limit = self.zero.reduce_bucket_size
        if self._numel + param.numel() > limit:
            self._empty_bucket()
            self._side = (self._side + 1) % len(self._bucket)
        if param.numel() <= limit:
            place = self._bucket[self._side][self._numel : self._numel + param.numel()]
            param.grad.data = place.view(param.shape)
        self._waiting.append(param)
        self._numel += param.numel()

    def _empty_bucket(self) -> None:
        """Reduce what waits, and keep what belongs to this rank's slice."""
        if not self._waiting:
            return
        self._allreduce()
        for param in self._waiting:
            if hasattr(param, "_index_in_param_group"):
                self._keep(param)
            elif self.zero.stage == 2:
                param.grad = None
        self._waiting, self._numel = [], 0

    def _allreduce(self) -> None:
        # Every piece of a rank's is copied together with the others, unless it is alone.
        sizes = [size for param in self._waiting for size in self._pieces(param)]
        for bucket in buckets(sizes, self.zero.reduce_bucket_size, lambda size: size):
            together = self._waiting[0].new_empty(sum(bucket) if len(bucket) > 1 else 0)
            dist.all_reduce(together if len(bucket) > 1 else self._alone(bucket[0]))

    def _alone(self, numel: int) -> Tensor:
        with self.ledger.part(None):
            return torch.empty(numel, dtype=self.dtype, device="meta")

    def _pieces(self, param: Tensor) -> Iterator[int]:
        """How a gradient is cut by the ranks whose slices it lies in; merges are left out."""
        place = param._hp_mapping  # type: ignore[attr-defined]
        start, end, size = place.start, place.start + param.numel(), place.size
        cuts = [start, *range((start // size + 1) * size, end, size), end]
        yield from (b - a for a, b in pairwise(cuts))

    def _keep(self, param: Tensor) -> None:
        assert param.grad is not None
        if self._owned is None:
            numel = sum(p.numel() for share in self._shares for p in share.mine)
            with self.ledger.part(self.gradients):
                self._owned = param.new_empty(numel)
        param.grad.data = self._owned[: param.numel()].view(param.shape)

    def reduce(self) -> None:
        is_boundary = self._is_gradient_accumulation_boundary
        if self.zero.stage == 1 and not is_boundary:
            return
        if self.zero.stage == 1 and not self.zero.overlap_comm:
            for param in self.params:
                if param.grad is not None:
                    self._put_into_bucket(param)
        self._empty_bucket()
        wrapper = self.optimizer
        for index, share in enumerate(self._shares):
            with self.ledger.part(self.gradients):
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in share.mine]
            kept = wrapper.all_grad_tensors.get(index)
            wrapper.all_grad_tensors[index] = kept or grads
            if is_boundary:
                wrapper.averaged_gradients[index] = wrapper.all_grad_tensors[index]
                wrapper.all_grad_tensors[index] = None
        self._bucket, self._owned = [], None
        self.zero_grad()

    def take_step(self) -> None:
        for index, share in enumerate(self._shares):
            grads = self.optimizer.averaged_gradients[index]
            flat = torch.empty(share.share.numel(), dtype=grads[0].dtype, device="meta")
            share.share.grad = flat.to(torch.float32)
            self.optimizer.averaged_gradients[index] = None
            del grads, flat
            self.run_optimizer([self.basic_optimizer.param_groups[index]])
            share.share.grad = None
        for share in self._shares:
            part = share.flat[: share.share.numel()]
            dist.all_gather_into_tensor(share.flat, part)


def _mapping(group: int, start: int, end: int, size: int) -> Any:
    """Where a parameter lies in its group, and what of it in the first slice."""
    numel = max(0, min(end, size) - start)
    is_here = start < size
    place = SimpleNamespace(start=start, numel=numel)
    return SimpleNamespace(
        param_group_index=group,
        hp_fragment_address=place,
        lp_fragment_address=SimpleNamespace(start=0, numel=numel),
        start=start,
        size=size,
        is_here=is_here,
    )
