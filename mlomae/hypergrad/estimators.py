"""Ways to estimate a hypergradient: how the adjoint of a level's weights is pushed down.

An estimator is given the adjoint lambda = dF/dw of a level's trained weights w, averaged over
ranks, and adds (dw/dothers)^T lambda to the sinks of the levels which that level's loss reads.
Costs are counted in forward passes of the level's own model: a backward pass is two, a tangent pass
about three, one with a Hessian product about nine.
"""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping

from mlomae.hypergrad.adjoints import ShardAdjoint, adjoint_of
from mlomae.hypergrad.level import Binding, Level
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.products import DifferenceProducts, Products, Sinks, TangentProducts
from mlomae.hypergrad.steps import newest, through_step

logger = logging.getLogger(__name__)


class Estimator(ABC):
    """What all estimators share: how many steps they need, and where they get products from."""

    products: Products = TangentProducts()
    differentiates_step = False  # whether the optimizer's own arithmetic is differentiated
    reuses_activations = True  # of the levels below, which a step has kept

    def window(self, level: Level) -> int:
        """Newest steps of the level in a cycle which must be recorded."""
        return 1

    def check(self, level: Level) -> None:
        """Refuse a level for which this estimator cannot work.

        Raises:
            ValueError: says why, and the fix.
        """
        window = self.window(level)
        if window < 1:
            raise ValueError(f"{self}: at least one step of level {level.name} must be unrolled")
        if level.num_steps < window:
            raise ValueError(
                f"level {level.name} takes {level.num_steps} steps in a cycle, but {self} asks for "
                f"{window}; raise its num_steps or lower the steps"
            )
        if self.differentiates_step:
            adjoint_of(level.optimizer)
        elif level.settings is not None:
            raise ValueError(
                f"level {level.name}: {self} does not differentiate settings; use Unrolled, "
                "Truncated or Sama"
            )
        if isinstance(self.products, TangentProducts):
            _refuse_custom_kernels(level)

    @abstractmethod
    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        """Add the pushed-down adjoint to the sinks. All ranks must call.

        Args:
            binding: of the level to push through, with its recorded steps.
            adjoint: lambda.
            sinks: of the levels whose derivative is wanted, by name.
        """

    def __repr__(self) -> str:
        public = {k: v for k, v in vars(self).items() if k != "products" and k[0] != "_"}
        values = ", ".join(f"{k}={v}" for k, v in public.items() if v is not None)
        return f"{type(self).__name__}({values})"


class Unrolled(Estimator):
    """Exact derivative through the last k optimizer steps that were really taken.

    Every step is differentiated with its moments, bias corrections, decay, parameter groups,
    schedule, clipping and accumulation, at the weights and batches it was taken with.

    Cost: k tangent passes, of which k - 1 are backpropagated for the Hessian products; k recorded
    steps as shards (weights in compute precision, gradient and moments in float32).
    Needs: SGD, Adam or AdamW of PyTorch; any ZeRO stage and precision.
    Source: Franceschi et al., arXiv 1703.01785; Choe et al., arXiv 2207.02849, for the setting.

    Args:
        steps: k, or a number for each level by name.
    """

    differentiates_step = True
    keeps_hessian = True

    def __init__(self, steps: int | Mapping[str, int] = 1) -> None:
        self.steps = steps

    def window(self, level: Level) -> int:
        if isinstance(self.steps, int):
            return self.steps
        if level.name not in self.steps:
            raise ValueError(f"{self}: say how many steps of level {level.name} to unroll")
        return self.steps[level.name]

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        records = newest(binding, self.window(binding.level))
        shards = [ShardAdjoint(a) for a in adjoint]
        adjoint.clear()  # `shards` alone holds it on, to let go of it
        for record in reversed(records):
            is_oldest = record is records[0]
            cotangent = through_step(binding, record, shards, sinks, is_oldest=is_oldest)
            hessian = self.products(
                binding,
                record.weights,
                record.micro_batches,
                cotangent,
                sinks,
                hessian=self.keeps_hessian and not is_oldest,
            )
            for shard, product in zip(shards, hessian, strict=False):
                shard.weight = shard.weight + product


class Truncated(Unrolled):
    """The last j steps without Hessian terms: as `Unrolled`, with dL/dw taken for constant in w.

    Cost: j tangent passes, none of which is backpropagated through the model.
    Needs: as `Unrolled`.
    Source: first-order truncation, Shaban et al., arXiv 1810.10667; Finn et al., arXiv 1703.03400.

    Args:
        steps: j, or a number for each level by name.
    """

    keeps_hessian = False


class Identity(Estimator):
    """The inverse Hessian replaced by the identity: -(d2L / dothers dw)^T lambda.

    Taken at the newest weights and the last step's batches, as the public MLO-MAE computes it (by
    differences there, without a step size here). Learning rates do not enter, so where paths
    through several levels meet, their relative weight is arbitrary.

    Cost: one tangent pass.
    Needs: any optimizer, ZeRO stage and precision.
    Source: DARTS, Liu et al., arXiv 1806.09055; Luketina et al., arXiv 1511.06727.
    """

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        self._mixed(binding, [-a for a in adjoint], sinks)

    def _mixed(self, binding: Binding, direction: Vector, sinks: Sinks) -> None:
        (record,) = newest(binding, 1)
        self.products(binding, None, record.micro_batches, direction, sinks, hessian=False)


class Sama(Identity):
    """`Identity`, with the adjoint scaled by the optimizer's own derivative du/dg.

    The diagonal includes the bias corrections, which the published formula leaves out, and the
    product is the tangent pass; with `FiniteDifference` it is a difference as published.

    Cost: one tangent pass.
    Needs: SGD, Adam or AdamW of PyTorch; any ZeRO stage and precision.
    Source: Choe et al., arXiv 2310.05674.
    """

    differentiates_step = True

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        (record,) = newest(binding, 1)
        shards = [ShardAdjoint(a) for a in adjoint]
        self._mixed(binding, through_step(binding, record, shards, sinks, is_oldest=True), sinks)


class _Implicit(Identity):
    """What Neumann's series and conjugate gradients share: Hessian products at newest weights."""

    def _hessian(self, binding: Binding, direction: Vector) -> Vector:
        (record,) = newest(binding, 1)
        return self.products(binding, None, record.micro_batches, direction, {}, hessian=True)


class Neumann(_Implicit):
    """Implicit gradient with the inverse Hessian as alpha * sum over i <= K of (I - alpha H)^i.

    Converges to the implicit gradient when the level is at its minimum and every eigenvalue of H
    lies between 0 and 2 / alpha.

    Cost: K tangent passes that are backpropagated, and one that is not.
    Needs: any optimizer, ZeRO stage and precision.
    Source: Lorraine et al., arXiv 1911.02590.

    Args:
        terms: K.
        step_size: alpha.
    """

    def __init__(self, terms: int, step_size: float) -> None:
        if terms < 0 or not step_size > 0:
            raise ValueError("Neumann: terms must not be negative, and step_size must be positive")
        self.terms = terms
        self.step_size = step_size

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        term, total = adjoint, [a.clone() for a in adjoint]
        for _ in range(self.terms):
            product = self._hessian(binding, term)
            term = [t - self.step_size * h for t, h in zip(term, product, strict=True)]
            total = [s + t for s, t in zip(total, term, strict=True)]
        self._mixed(binding, [-self.step_size * s for s in total], sinks)


class ConjugateGradient(_Implicit):
    """Implicit gradient with (H + damping I) p = lambda solved by conjugate gradients.

    Stops early, with a warning, where H + damping I turns out not to be positive definite.

    Cost: at most that many tangent passes that are backpropagated, and one that is not.
    Needs: any optimizer, ZeRO stage and precision.
    Source: Pedregosa, arXiv 1602.02355; Rajeswaran et al., arXiv 1909.04630.

    Args:
        iterations: at most.
        tolerance: stop when the residual is below this part of |lambda|.
        damping: added to the diagonal.
    """

    def __init__(self, iterations: int, tolerance: float = 1e-10, damping: float = 0.0) -> None:
        if iterations < 1:
            raise ValueError("ConjugateGradient: at least one iteration is needed")
        self.iterations = iterations
        self.tolerance = tolerance
        self.damping = damping

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        self._mixed(binding, [-p for p in self._solve(binding, adjoint)], sinks)

    def _solve(self, binding: Binding, target: Vector) -> Vector:
        partition = binding.level.partition
        dot, solution = partition.dot, partition.zeros()
        residual = search = target
        squared = dot(residual, residual)
        stop = squared * self.tolerance**2
        for _ in range(self.iterations):
            if squared <= stop:
                break
            product = _added(self._hessian(binding, search), self.damping, search)
            curvature = dot(search, product)
            if curvature <= 0:
                logger.warning(
                    "%s: the Hessian of level %s is not positive definite (curvature %.1e); "
                    "raise damping",
                    self,
                    binding.level.name,
                    curvature,
                )
                break
            rate = squared / curvature
            solution = _added(solution, rate, search)
            residual = _added(residual, -rate, product)
            previous, squared = squared, dot(residual, residual)
            search = _added(residual, squared / previous, search)
        return solution


class FiniteDifference(Estimator):
    """Another estimator whose products are central differences of the loss.

    Both sides draw the same random numbers and run on copies of the weights; nothing is restored.
    Where the loss is no `WeightedLoss`, choices inside it (which patches to hide, rectifiers) may
    switch between the two sides; each switch is a jump divided by twice the step. What the loss
    detaches moves as well.

    Cost: two forward passes instead of a tangent pass for a `WeightedLoss`, else two forward
    passes with backward passes to the other levels; two full backward passes for a Hessian product.
    Needs: a step that the compute precision resolves, so in practice float32 or wider, without
    autocast inside the loss, which is not noticed; any attention kernel and ZeRO stage.
    Source: Pearlmutter, Neural Computation 6(1), 1994; DARTS, arXiv 1806.09055, with radius 0.01.

    Args:
        estimator: which recursion.
        relative_step: how far the weights are moved, relative to their global norm.
        radius: how far, absolutely; give this or `relative_step`.
    """

    reuses_activations = False

    def __init__(
        self,
        estimator: Estimator,
        *,
        relative_step: float | None = None,
        radius: float | None = None,
    ) -> None:
        if isinstance(estimator, FiniteDifference):
            raise ValueError("FiniteDifference: give it an estimator with exact products")
        if (relative_step is None) == (radius is None):
            raise ValueError("FiniteDifference: give either relative_step or radius")
        if not (relative_step or radius or 0) > 0:
            raise ValueError("FiniteDifference: the step must be positive")
        self.estimator = copy.copy(estimator)
        self.relative_step = relative_step
        self.radius = radius
        self._products = DifferenceProducts(relative_step, radius)
        self.estimator.products = self._products

    def window(self, level: Level) -> int:
        return self.estimator.window(level)

    def check(self, level: Level) -> None:
        self.estimator.check(level)
        self._products.distance(level, level.partition.weights())

    def push(self, binding: Binding, adjoint: Vector, sinks: Sinks) -> None:
        self.estimator.push(binding, adjoint, sinks)


def _added(vector: Vector, factor: float, other: Vector) -> Vector:
    return [v + factor * o for v, o in zip(vector, other, strict=True)]


def _refuse_custom_kernels(level: Level) -> None:
    for name, module in level.twin.root.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in _WITHOUT_FORWARD_MODE:
            raise ValueError(
                f"level {level.name}: {name or 'its model'} is a {type(module).__name__} of "
                f"{package}, which has no forward-mode derivative; use PyTorch's attention and "
                "layers there, or FiniteDifference(...)"
            )


_WITHOUT_FORWARD_MODE = ("flash_attn", "xformers", "transformer_engine", "apex")
