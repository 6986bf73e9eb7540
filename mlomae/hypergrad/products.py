"""Products of a direction with the second derivatives of a level's loss.

For a loss L(w, others) and a direction c in w-space both ways here form the scalar
s = <dL/dw, c>. Backpropagating it gives (d2L / dothers dw)^T c for every other level in one pass,
and (d2L / dw2) c when asked for.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from mlomae.hypergrad.functions import differentiable_functions, explain
from mlomae.hypergrad.level import Binding, Level
from mlomae.hypergrad.losses import Models, WeightedLoss
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.records import MicroBatch
from mlomae.hypergrad.twin import GradientSink, Weights, running

Sinks = dict[str, GradientSink]
"""Where the derivatives by other levels' weights go, by the level's name."""


class Products(Protocol):
    """A way to the products."""

    def __call__(
        self,
        binding: Binding,
        weights: Vector | None,
        micro_batches: Sequence[MicroBatch],
        direction: Vector,
        sinks: Sinks,
        *,
        hessian: bool,
    ) -> Vector:
        """Add (d2L / dothers dw)^T c to the sinks. All ranks must call.

        Args:
            binding: of the level whose loss L is, and whose weights w are.
            weights: where to differentiate, as shards; None for the live weights.
            micro_batches: L is the mean over them.
            direction: c, averaged over ranks.
            sinks: of the levels whose derivative is wanted; the others are constants.
            hessian: whether (d2L / dw2) c is wanted.

        Returns:
            (d2L / dw2) c averaged over ranks, or an empty vector.
        """


class TangentProducts:
    """Exact: a forward pass with dual weights (w, c), whose output tangent is s.

    When nothing but levels above are reached through the loss's weights, autograd records nothing
    of the level's own model. Works in any precision, for it has no step size. Attention kernels
    without a forward-mode rule are replaced while the weights are dual.
    """

    def __call__(
        self,
        binding: Binding,
        weights: Vector | None,
        micro_batches: Sequence[MicroBatch],
        direction: Vector,
        sinks: Sinks,
        *,
        hessian: bool,
    ) -> Vector:
        level = binding.level
        product = GradientSink(level.partition) if hessian else None
        scale, tangents = _scaled(level, direction)
        # Gathered like the tangents, for live weights lie in memory in other ways.
        values = level.partition.weights() if weights is None else weights
        is_table = _is_table(level, sinks, product)
        for micro_batch in micro_batches:
            # What the step called below depends on no weight of its own level; it serves one sweep.
            kept = micro_batch.kept if binding.keeps else None
            if kept is not None and not all(name in sinks for name in kept.names):
                kept = None
            with (
                _explained(level),
                _running(binding, values, tangents, sinks, product, micro_batch) as models,
            ):
                if kept is not None:
                    models |= {n: kept.replaying(n, models[n]) for n in kept.names}
                value = _derivative(level, models, micro_batch, is_table)
                # Outside the dual level, or the backward pass would carry tangents as well.
                _backward(value * (scale / len(micro_batches)))
            if kept is not None:
                kept.backward(sinks)
                micro_batch.kept = None
        return product.take() if product else []


class DifferenceProducts:
    """Central difference of the loss at w + eps c and w - eps c.

    Both sides draw the same random numbers. They run on copies of the weights, so that nothing has
    to be restored. Any attention kernel serves.

    Args:
        relative_step: eps |c| / |w|, global norms.
        radius: eps |c|; the alternative to `relative_step`.
    """

    def __init__(self, relative_step: float | None, radius: float | None) -> None:
        self._relative_step = relative_step
        self._radius = radius

    def __call__(
        self,
        binding: Binding,
        weights: Vector | None,
        micro_batches: Sequence[MicroBatch],
        direction: Vector,
        sinks: Sinks,
        *,
        hessian: bool,
    ) -> Vector:
        level, partition = binding.level, binding.level.partition
        product = GradientSink(partition) if hessian else None
        norm = math.sqrt(partition.dot(direction, direction))
        base = partition.weights() if weights is None else weights
        eps = self.distance(level, base) / (norm or 1.0)
        for micro_batch in micro_batches:
            self._one(
                binding, base, direction, eps, sinks, product, micro_batch, len(micro_batches)
            )
        return product.take() if product else []

    def distance(self, level: Level, weights: Vector) -> float:
        """How far the weights are moved, in the global 2-norm. All ranks must call.

        Raises:
            ValueError: so little that the compute precision does not hold the moved weights.
        """
        norm = math.sqrt(level.partition.dot(weights, weights))
        distance = self._radius or (self._relative_step or 0.0) * norm
        if not distance:
            raise ValueError(
                f"level {level.name}: its weights are all zero, and so is a step relative to their "
                "norm; give radius instead of relative_step"
            )
        resolution = torch.finfo(level.dtype).eps
        if distance < resolution * norm:
            raise ValueError(
                f"level {level.name}: a finite difference that moves the weights by "
                f"{distance / norm:.1e} of their norm is below the resolution {resolution:.1e} of "
                f"{str(level.dtype).removeprefix('torch.')}; compute in float32, take a larger "
                "step, or use an estimator without FiniteDifference"
            )
        return distance

    def _one(
        self,
        binding: Binding,
        base: Vector,
        direction: Vector,
        eps: float,
        sinks: Sinks,
        product: GradientSink | None,
        micro_batch: MicroBatch,
        num: int,
    ) -> None:
        level = binding.level
        table: Any = 0.0
        is_table = _is_table(level, sinks, product)
        for sign in (1.0, -1.0):
            moved = [
                (w + c * (sign * eps)).to(w.dtype) for w, c in zip(base, direction, strict=True)
            ]
            factor = sign / (2 * eps * num)
            with _running(binding, moved, None, sinks, product, micro_batch) as models:
                if is_table:
                    losses, factors = _table(level, models, micro_batch)
                    table = table + losses * factor
                else:
                    _backward(_reweighted(level, models, micro_batch) * factor)
        if is_table:
            _backward((factors * table).sum())


def _scaled(level: Level, direction: Vector) -> tuple[float, Vector]:
    """The direction as a factor and tangents in compute precision.

    In half precision the tangents have unit length, clear of its smallest numbers.
    """
    if all(c.dtype == level.dtype for c in direction):
        return 1.0, direction
    norm = math.sqrt(level.partition.dot(direction, direction))
    return norm, [(c * (1 / norm if norm else 0.0)).to(level.dtype) for c in direction]


def _is_table(level: Level, sinks: Sinks, product: GradientSink | None) -> bool:
    """Whether the losses of a `WeightedLoss` are plain numbers for every wanted derivative."""
    through_losses = product is not None or any(name in sinks for name in level.lower)
    return isinstance(level.loss, WeightedLoss) and not through_losses


def _derivative(level: Level, models: Models, micro_batch: MicroBatch, is_table: bool) -> Tensor:
    with forward_ad.dual_level(), differentiable_functions():
        if not isinstance(level.loss, WeightedLoss):
            return _tangent(level.evaluate(models, micro_batch))
        frozen = micro_batch.frozen
        losses, _ = level.loss.losses(models, micro_batch.batch, frozen)
        derivatives = _tangent(losses)
    if is_table:  # autograd recorded nothing: no weight that the losses read has a sink
        derivatives = derivatives.detach()
    return (level.loss.weights(models, frozen) * derivatives).sum()


def _table(level: Level, models: Models, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Losses as plain numbers, and their weights, which draw random numbers after them."""
    assert isinstance(level.loss, WeightedLoss)
    with torch.no_grad():
        losses, _ = level.loss.losses(models, micro_batch.batch, micro_batch.frozen)
    return losses, level.loss.weights(models, micro_batch.frozen)


def _reweighted(level: Level, models: Models, micro_batch: MicroBatch) -> Tensor:
    """The loss, with what a `WeightedLoss` froze held fixed."""
    if not isinstance(level.loss, WeightedLoss):
        return level.evaluate(models, micro_batch)
    frozen = micro_batch.frozen
    losses, _ = level.loss.losses(models, micro_batch.batch, frozen)
    return (level.loss.weights(models, frozen) * losses).sum()


@contextmanager
def _running(
    binding: Binding,
    weights: Vector | None,
    tangents: Vector | None,
    sinks: Sinks,
    product: GradientSink | None,
    micro_batch: MicroBatch,
) -> Iterator[dict[str, Any]]:
    """Twins of the level and of all that its loss reads, as the step found them."""
    level = binding.level
    sources = {
        level.name: Weights(
            level.twin, level.partition, values=weights, tangents=tangents, sink=product
        )
    }
    sources |= binding.weights_of_others(sinks)
    with running(sources, micro_batch.modes) as models:
        micro_batch.random_state.restore()
        yield models


def _tangent(output: Tensor) -> Tensor:
    dual = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual.primal) if dual.tangent is None else dual.tangent


def _backward(value: Tensor) -> None:
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _explained(level: Level) -> Iterator[None]:
    """Torch's error about a function without a forward-mode rule, as a sentence with the fix."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        reason = explain(error)
        if reason is None:
            raise
        raise ValueError(
            f"level {level.name}: the tangent pass cannot run, {reason}; replace that function in "
            "the model or use FiniteDifference(...)"
        ) from error
