"""One level of a multilevel problem: record its step, differentiate through it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlomae.hypergrad.adjoints import adamw_cotangent, clipping_cotangent, sgd_cotangent
from mlomae.hypergrad.partition import Vector, partition_of
from mlomae.hypergrad.tangent import DualModule, unpack


@dataclass
class StepRecord:
    """What it takes to differentiate one optimizer step, as shards.

    Attributes:
        weights: the weights before the step, in compute precision.
        grads: the gradient as the optimizer used it, by shard.
        settings: hyperparameters of each shard's parameter group at the step, by shard.
        norm: global norm of the gradient before clipping.
    """

    weights: Vector
    norm: float
    grads: dict[int, Tensor] = field(default_factory=dict)
    settings: dict[int, dict[str, Any]] = field(default_factory=dict)


class Level:
    """A module with its optimizer, or a DeepSpeed engine at ZeRO stage 0, 1, 2 or 3.

    Args:
        model: the module, or the engine.
        optimizer: the module's optimizer (`torch.optim.SGD` or `AdamW`); None for an engine.
            Clipping by global norm is differentiated for engines (`gradient_clipping`) only.
        template: the same architecture built apart, best under `torch.device("meta")`. It loses
            its parameters and serves the tangent pass; None for a level that needs none, such as
            the uppermost.

    Raises:
        ValueError: the optimizer or the engine's configuration has no exact adjoint here.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        template: nn.Module | None = None,
    ) -> None:
        self.partition = partition_of(model, optimizer)
        self.optimizer = self.partition.optimizer
        self.max_norm = 0.0 if optimizer is not None else float(model.gradient_clipping())
        self._dual = None
        if template is not None:
            _check_optimizer(self.optimizer)
            self._dual = DualModule(template, model if optimizer is not None else model.module)
            if differing := sorted(self._dual.names ^ set(self.partition.params)):
                raise ValueError(
                    f"template and model differ in the trainable parameter {differing[0]}; build "
                    "them alike, and make frozen parameters buffers"
                )

    @contextmanager
    def recording(self) -> Iterator[StepRecord]:
        """Record the one optimizer step taken inside, from its finished backward pass on.

        The record stays valid until the level's next step, because it reads the optimizer's
        moments in place. All ranks must enter.
        """
        partition = self.partition
        record = StepRecord(partition.weights(), partition.gradient_norm() if self.max_norm else 0)
        index = {id(shard): i for i, shard in enumerate(partition.shards())}

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # ZeRO steps one group or sub-group at a time, so this may run several times.
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    if shard.grad is not None:
                        i = index[id(shard)]
                        record.grads[i] = shard.grad.detach().flatten().clone()
                        settings = {k: v for k, v in group.items() if k != "params"}
                        settings["first_step"] = not optimizer.state.get(shard)
                        record.settings[i] = settings

        handle = self.optimizer.register_step_pre_hook(note)
        try:
            yield record
        finally:
            handle.remove()

    def pull_back(self, loss: Tensor) -> Vector:
        """Gradient of an upper level's loss by this level's weights, averaged over ranks.

        The level takes no step, and afterwards its engine is as it was. All ranks must call,
        between steps and not between the micro-batches of one.

        Args:
            loss: scalar, of a forward pass through this level's model.
        """
        if loss.ndim:
            raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}")
        self.partition.backward(loss)
        adjoint = self.partition.gradient()
        self.partition.clear_gradients()
        return adjoint

    def cotangent(self, record: StepRecord, adjoint: Vector) -> Vector:
        """Cotangent of the recorded step's gradient from the adjoint of the new weights."""
        if not record.settings:
            raise RuntimeError("no optimizer step was taken while recording")
        shards = self.partition.shards()
        result = self.partition.zeros()
        for i, settings in record.settings.items():
            state = self.optimizer.state[shards[i]]
            result[i] = _step_cotangent(
                self.optimizer, adjoint[i], record.grads[i], state, settings
            )
        if 0 < self.max_norm < record.norm:
            zeros = self.partition.zeros()
            grads = [record.grads.get(i, zero) for i, zero in enumerate(zeros)]
            inner = self.partition.dot(grads, result)
            result = [
                clipping_cotangent(c, g, inner, norm=record.norm, max_norm=self.max_norm)
                for c, g in zip(result, grads, strict=True)
            ]
        return result

    @contextmanager
    def tangent(self, record: StepRecord, cotangent: Vector) -> Iterator["Tangent"]:
        """The tangent pass at the recorded weights in direction of a cotangent.

        Everything inside must happen alike on all ranks, for weights are gathered on the way.
        """
        if self._dual is None:
            raise RuntimeError("the tangent pass needs a template: Level(..., template=...)")
        norm = math.sqrt(self.partition.dot(cotangent, cotangent))
        # A direction of unit length keeps clear of the compute precision's smallest numbers.
        scale = 1 / norm if norm else 0.0
        dtype = record.weights[0].dtype
        direction = [(c * scale).to(dtype) for c in cotangent]
        with self._dual.running(
            lambda names: self.partition.gather(names, record.weights, direction)
        ) as module:
            yield Tangent(module, norm)


@dataclass(frozen=True)
class Tangent:
    """An open tangent pass: run `module`, then read the derivatives of what comes out."""

    module: nn.Module
    norm: float

    def of(self, output: Tensor) -> Tensor:
        """Directional derivative of an output along the cotangent."""
        return unpack(output)[1] * self.norm

    def of_loss(self, loss_function: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
        """Directional derivative of a scalar loss of an output, itself differentiable.

        The loss is differentiated in reverse mode, since cross-entropy is among the functions
        whose forward-mode derivative cannot be backpropagated (torch 2.13).
        """
        value, tangent = unpack(output)
        (gradient,) = torch.autograd.grad(loss_function(value), value, create_graph=True)
        return (gradient * tangent).sum() * self.norm


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in (torch.optim.SGD, torch.optim.AdamW):
        raise ValueError(
            f"{type(optimizer).__name__} has no adjoint here; use torch.optim.SGD or AdamW"
        )
    for option in ("amsgrad", "maximize"):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"{option}=True has no adjoint here; switch it off")


def _step_cotangent(
    optimizer: torch.optim.Optimizer,
    adjoint: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    settings: dict[str, Any],
) -> Tensor:
    if isinstance(optimizer, torch.optim.SGD):
        return sgd_cotangent(
            adjoint,
            lr=float(settings["lr"]),
            momentum=settings["momentum"],
            dampening=settings["dampening"],
            nesterov=settings["nesterov"],
            first_step=settings["first_step"],
        )
    return adamw_cotangent(
        adjoint,
        grad,
        state["exp_avg"].flatten(),
        state["exp_avg_sq"].flatten(),
        lr=float(settings["lr"]),
        betas=settings["betas"],
        eps=settings["eps"],
        step=float(state["step"]),
    )
