"""What DeepSpeed's engines hold and send, on tensors without memory; here ZeRO stage 0.

An engine here allocates on the `meta` device what DeepSpeed 0.19 allocates at the same moment:
flat groups, shards, gradient buckets, gathered weights. It has the attributes that
`mlomae.hypergrad` reads of an engine, so that all the rest of a cycle is the program's code.
"""

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.commands.plan.ledger import Ledger

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
RECORDS, BUFFERS, GATHERED = "recorded steps", "buffers", "gathered weights"
PLAIN_ALLREDUCE_NUMEL = 500_000_000  # stage 0 reduces gradients in pieces of so many elements


class PlannedEngine:
    """What all stages share: the names under which an engine is read, and stage 0.

    Args:
        zero: DeepSpeed's settings of `zero_optimization`.
        dtype: of forward and backward passes.
        owner: ends the names of the parts that hold weights, gradients and optimizer.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        zero: Any,
        dtype: torch.dtype,
        num_micro_batches: int,
        max_norm: float,
        ledger: Ledger,
        owner: str = "",
    ) -> None:
        self.weights, self.optimizer_part, self.gradients = (
            f"{part}{owner}" for part in (WEIGHTS, OPTIMIZER, GRADIENTS)
        )
        self.module, self.basic_optimizer, self.zero = module, optimizer, zero
        self.dtype, self.ledger, self.device = dtype, ledger, torch.device("meta")
        self._num_micro_batches, self._max_norm = num_micro_batches, max_norm
        self._config = SimpleNamespace(zero_config=zero)
        self._is_gradient_accumulation_boundary = True
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.params = [param for group in self.groups for param in group]
        self.optimizer = SimpleNamespace(
            zero_grad=self.zero_grad, averaged_gradients={}, all_grad_tensors={}, loss_scale=1.0
        )
        with ledger.part(self.weights):
            for param in self.params:
                param.data = param.data.to(dtype)
        self.shard()
        with ledger.part(self.optimizer_part):
            for param in (p for group in optimizer.param_groups for p in group["params"]):
                _remember(optimizer, param)
        for param in self.params:
            param.register_post_accumulate_grad_hook(self.on_gradient)

    def shard(self) -> None:
        """Give the optimizer what it steps."""
        if self.dtype == torch.float32:
            return
        self.optimizer.fp16_groups = self.groups
        for group, params in zip(self.basic_optimizer.param_groups, self.groups, strict=True):
            with self.ledger.part(self.optimizer_part):
                group["params"] = [nn.Parameter(p.detach().float()) for p in params]

    def watch(self) -> None:
        """Hook into the module, of which a twin has been made."""

    def on_gradient(self, param: Tensor) -> None:
        """A gradient is complete."""
        self._mark(param)

    def _mark(self, param: Tensor) -> None:
        assert param.grad is not None
        self.ledger.move(param.grad, self.gradients)

    def reduce(self) -> None:
        """After the backward pass of a micro-batch."""
        if not self._is_gradient_accumulation_boundary:
            return
        grads = [param.grad for param in self.params if param.grad is not None]
        for bucket in buckets(grads, PLAIN_ALLREDUCE_NUMEL):
            dist.all_reduce(torch.cat([grad.flatten() for grad in bucket]))

    def take_step(self) -> None:
        """Let the optimizer step on reduced gradients."""
        steps = [p for group in self.basic_optimizer.param_groups for p in group["params"]]
        flat = [param for group in self.groups for param in group]
        for step, param in zip(steps, flat, strict=True):
            if step is not param and param.grad is not None:
                step.grad = param.grad.to(step.dtype)
        self.run_optimizer(self.basic_optimizer.param_groups)
        for step in steps:
            step.grad = None

    def run_optimizer(self, groups: list[dict[str, Any]]) -> None:
        """The step hooks without the arithmetic, which fused kernels do in place."""
        optimizer = self.basic_optimizer
        every, optimizer.param_groups = optimizer.param_groups, groups
        with self.ledger.part(RECORDS):
            _fused_step(optimizer)
        optimizer.param_groups = every

    # --- what `Level` calls --------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._num_micro_batches).backward()  # type: ignore[no-untyped-call]
        with self.ledger.part(BUFFERS):
            self.reduce()

    def step(self) -> None:
        with self.ledger.part(BUFFERS):
            self.take_step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_gradient_accumulation_boundary = is_boundary

    def gradient_accumulation_steps(self) -> int:
        return self._num_micro_batches

    def gradient_clipping(self) -> float:
        return self._max_norm

    def zero_optimization_stage(self) -> int:
        return int(self.zero.stage)

    def zero_cpu_offload(self) -> bool:
        return False  # what offload moves to the host is the ledger's to leave out

    def fp16_enabled(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return False

    def managed_gradient_accumulation(self) -> bool:
        return True


def offloads(config: Mapping[str, Any], key: str) -> bool:
    """Whether a JSON keeps optimizer or weights in host memory."""
    section = config.get("zero_optimization", {}).get(key) or {}
    return bool(section.get("device", "none") != "none")


def buckets(
    items: list[Any], limit: int, numel: Callable[[Any], int] = torch.numel
) -> Iterator[list[Any]]:
    """Lists of items that are closed as soon as they are larger than a limit."""
    bucket: list[Any] = []
    for item in items:
        bucket.append(item)
        if sum(map(numel, bucket)) > limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _remember(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    names = ("momentum_buffer",) if "momentum" in optimizer.defaults else ("exp_avg", "exp_avg_sq")
    optimizer.state[param] = {name: torch.empty_like(param) for name in names} | {"step": 1.0}


def _no_arithmetic(optimizer: torch.optim.Optimizer) -> None:
    pass


_fused_step = torch.optim.Optimizer.profile_hook_step(_no_arithmetic)
