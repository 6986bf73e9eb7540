"""DeepSpeed engines: one for each level, with its schedule and its guard against bad steps."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from timm.optim import Lars, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import Tensor, nn

from mlomae.distributed.collectives import all_agree
from mlomae.hypergrad import Hypergradient, Level
from mlomae.hypergrad.losses import Loss
from mlomae.hypergrad.partition import Vector
from mlomae.recipe import LevelRecipe

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 3


class NonFiniteError(RuntimeError):
    """Training met a non-finite loss or gradient several times in a row."""


class TrainingLevel(Level):
    """A level on a DeepSpeed engine, with its learning-rate schedule and its guard.

    `step` and `apply` take the optimizer step on all ranks, or on none when one rank saw a number
    that is not finite.

    Attributes:
        engine: the DeepSpeed engine, which is also the level's `model`.
        total_steps: optimizer steps of the whole run; sizes the schedule.
        num_steps_done: optimizer steps taken or skipped so far.
        num_skipped: of these, the latest ones that were skipped in a row.
        was_taken: whether the latest step was taken, not skipped; the same on all ranks.
        latest_loss, grad_norm, lr: of the latest step, on this rank (the norm is global; the rate
            is that of the parameter groups that learn fastest).
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        recipe: LevelRecipe,
        *,
        loss: Loss,
        lower: Sequence[str] = (),
        upper: Sequence[str] = (),
        total_steps: int,
        warmup_steps: int,
    ) -> None:
        super().__init__(
            name, engine, loss=loss, lower=lower, upper=upper, num_steps=recipe.steps_per_cycle
        )
        self.engine = engine
        self.total_steps = total_steps
        self.num_steps_done = 0
        self.num_skipped = 0
        self.was_taken = False
        self.latest_loss = self.grad_norm = self.lr = math.nan
        kind = CosineLRScheduler if recipe.schedule == "cosine" else _LinearLRScheduler
        self._rate_schedule = kind(
            self.optimizer,
            t_initial=max(1, total_steps - warmup_steps),
            lr_min=recipe.min_lr,
            warmup_t=warmup_steps,
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass through the engine."""
        return self.engine(*args, **kwargs)

    def backward(self, *micro_batches: Any) -> Tensor:
        """Leave the gradient of the mean loss in the engine, and return the loss.

        Args:
            micro_batches: as many as the level accumulates.
        """
        loss = super().backward(*micro_batches)
        self.latest_loss = float(loss)
        return loss

    def step_with_hypergradient(self, hypergradient: Hypergradient) -> None:
        """The same, on no rank when one of them saw a bad number."""
        self.latest_loss = float(hypergradient.loss)
        super().step_with_hypergradient(hypergradient)

    def apply(self) -> None:
        """The optimizer step; on no rank when one of them saw a bad number.

        Raises:
            NonFiniteError: this was the third skipped step in a row.
        """
        self._rate_schedule.step_update(self.num_steps_done)
        self.num_steps_done += 1
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.grad_norm = self.partition.gradient_norm()
        is_finite = math.isfinite(self.latest_loss) and math.isfinite(self.grad_norm)
        self.was_taken = all_agree(is_finite)
        if self.was_taken:
            self.num_skipped = 0
            super().apply()
            return
        self.discard()
        self._count_skipped()

    def _count_skipped(self) -> None:
        self.num_skipped += 1
        logger.warning(
            "skipped %s step %d on all ranks: loss %s, gradient norm %s on rank %d",
            self.name,
            self.num_steps_done,
            self.latest_loss,
            self.grad_norm,
            dist.get_rank(),
        )
        if self.num_skipped == MAX_SKIPPED_STEPS:
            raise NonFiniteError(
                f"{self.name}: loss or gradient was not finite for {MAX_SKIPPED_STEPS} steps in a "
                f"row (up to step {self.num_steps_done}); lower {self.name}.lr, lengthen "
                f"{self.name}.warmup_epochs or set {self.name}.gradient_clipping, and start again "
                "in another output_dir; --resume goes on from the last checkpoint, which helps "
                "when a passing fault of a machine was the cause"
            )

    def counters(self) -> dict[str, int]:
        """The step counters that a checkpoint stores."""
        return {
            "num_steps": self.num_steps_done,
            "num_skipped": self.num_skipped,
            "global_steps": self.engine.global_steps,
        }

    def set_counters(self, num_steps: int, num_skipped: int, global_steps: int) -> None:
        """Take back what `counters` gave."""
        self.num_steps_done, self.num_skipped = num_steps, num_skipped
        self.engine.global_steps = global_steps
        self.engine.global_samples = global_steps * self.engine.train_batch_size()
        self.engine.micro_steps = global_steps * self.engine.gradient_accumulation_steps()

    def skip(self, reason: str) -> None:
        """Take no step in this cycle, for a reason that all ranks know and that lies elsewhere."""
        self._rate_schedule.step_update(self.num_steps_done)
        self.num_steps_done += 1
        self.was_taken = False
        self.latest_loss = self.grad_norm = math.nan
        logger.warning("skipped %s step %d: %s", self.name, self.num_steps_done, reason)


_LinearLRScheduler = partial(PolyLRScheduler, power=1.0)


def build_level(
    name: str,
    module: nn.Module,
    recipe: LevelRecipe,
    deepspeed_config: dict[str, Any],
    *,
    loss: Loss,
    lower: Sequence[str] = (),
    upper: Sequence[str] = (),
    total_steps: int,
    warmup_steps: int,
    param_groups: Sequence[dict[str, Any]] | None = None,
) -> TrainingLevel:
    """Wrap a module into a DeepSpeed engine with the recipe's optimizer and schedule.

    Args:
        deepspeed_config: the user's JSON with this level's batch sizes and clipping added.
        loss, lower, upper: as `mlomae.hypergrad.Level` has them.
        total_steps, warmup_steps: of the schedule.
        param_groups: the optimizer's, where they are others than `build_optimizer` makes; the
            rate of a group with `lr_scale` is that multiple of the schedule's.
    """
    optimizer = build_optimizer(module, recipe, param_groups)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config)
    return TrainingLevel(
        name,
        engine,
        recipe,
        loss=loss,
        lower=lower,
        upper=upper,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


@contextmanager
def evaluating(*levels: TrainingLevel) -> Iterator[None]:
    """Inside, the modules are in eval mode: no dropout or drop path, no random draws."""
    for level in levels:
        level.engine.module.eval()
    yield
    for level in levels:
        level.engine.module.train()


def build_optimizer(
    module: nn.Module,
    recipe: LevelRecipe,
    param_groups: Sequence[dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The recipe's optimizer, with its groups of weights that decay or do not."""
    groups = list(param_groups or _param_groups(module, recipe))
    kind: str = recipe.optimizer  # which a linear probe's recipe has more of
    if kind == "lars":
        return Lars(groups, lr=recipe.lr, momentum=recipe.momentum, always_adapt=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, fused=True)
    beta1, beta2 = recipe.betas
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(beta1, beta2), eps=recipe.eps, fused=True)


def _param_groups(module: nn.Module, recipe: LevelRecipe) -> list[dict[str, Any]]:
    if recipe.decay_norm_and_bias:
        return [{"params": list(module.parameters()), "weight_decay": recipe.weight_decay}]
    groups: list[dict[str, Any]] = param_groups_weight_decay(module, recipe.weight_decay)
    return groups


def full_weights(
    level: TrainingLevel, shards: Vector | None = None, *, everywhere: bool = False
) -> dict[str, Tensor]:
    """Weights and buffers of a level, whole, fp32, on the CPU. All ranks must call.

    Args:
        shards: another vector in the level's weight space than its fp32 masters.
        everywhere: on all ranks; else the weights are on the first rank alone.
    """
    partition = level.partition
    if shards is None:
        shards = [shard.detach().flatten() for shard in partition.shards()]
    weights = {}
    for name in partition.shapes:  # one at a time: memory stays at the largest parameter
        whole = partition.gather([name], shards)[0][name]
        if everywhere or dist.get_rank() == 0:
            weights[name] = whole.cpu().clone()
    buffers = level.engine.module.named_buffers()
    return weights | {name: _as_saved(buffer) for name, buffer in buffers}


def _as_saved(buffer: Tensor) -> Tensor:
    """A contiguous copy on the CPU, fp32 unless it counts something."""
    buffer = buffer.detach().cpu().clone(memory_format=torch.contiguous_format)
    return buffer.float() if buffer.is_floating_point() else buffer
