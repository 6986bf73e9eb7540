"""A level: its model, its loss and its optimizer's step; and its binding to one problem."""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mlomae.hypergrad.kept import KeptCalls
from mlomae.hypergrad.losses import (
    CalledModels,
    Loss,
    Models,
    ReplayedLoss,
    Settings,
    WeightedLoss,
)
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.randomness import RandomState
from mlomae.hypergrad.records import Hypergradient, MicroBatch, StepRecord, make_room, recording
from mlomae.hypergrad.twin import GradientSink, Twin, Weights
from mlomae.hypergrad.zero_partitions import partition_of


class Level:
    """A model with its optimizer, its loss, and the names of the levels that the loss reads.

    Which levels these names mean, and which steps are recorded, is a matter of each `Multilevel`
    problem that the level is put into. A step is recorded for all of them, unless they mean
    different levels by a name; then it has to be taken for one: `problem.step(name, ...)`. A level
    in no problem can step if its loss reads no other.

    Args:
        name: by which the losses of other levels call the model.
        model: a module, or a DeepSpeed engine at ZeRO stage 0, 1, 2 or 3. A module is not
            synchronised over ranks.
        optimizer: the module's; None for an engine, which has its own.
        loss: `(models, batch) -> scalar`. `models[name]` runs the model of this level or of one
            named in `lower` and `upper`.
        lower: levels below, whose trained weights the loss reads.
        upper: levels above, whose weights are hyperparameters of the loss.
        num_steps: optimizer steps in a cycle.
        max_norm: clip a module's gradient to this global norm; 0 does not clip. An engine clips
            by its own `gradient_clipping`.
        scheduler: its `step()` is called after each optimizer step of a module.
        settings: `(models) -> Settings`, values that depend on levels in `upper`; they are set
            before each step, and differentiated.

    Raises:
        ValueError: the engine's configuration cannot be read exactly.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss,
        lower: Sequence[str] = (),
        upper: Sequence[str] = (),
        num_steps: int = 1,
        max_norm: float = 0.0,
        scheduler: Any = None,
        settings: Callable[[Models], Settings] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.loss = loss
        self.lower, self.upper = tuple(lower), tuple(upper)
        self.num_steps = num_steps
        self.scheduler = scheduler
        self.settings = settings
        self.is_engine = optimizer is None
        self.partition = partition_of(model, optimizer)
        self.optimizer = self.partition.optimizer
        self.max_norm = float(model.gradient_clipping()) if self.is_engine else max_norm
        if self.is_engine and max_norm:
            raise ValueError(f"level {name}: set max_norm as gradient_clipping of its engine")
        self.twin = Twin(model.module if self.is_engine else model)
        self.dtype = self.partition.dtype  # of compute
        if len({param.dtype for param in self.partition.params.values()}) > 1:
            raise ValueError(f"level {name}: its weights have several dtypes; bring them to one")
        self.num_moves = 0  # steps that its weights have ever taken
        self._bindings: list[weakref.ref[Binding]] = []  # that of a dropped problem dies
        self._served: Binding | None = None  # the one that has to be stepped for, inside `serving`
        self._pending: _Pending | None = None  # between `backward` and `apply`
        self._used: set[str] = set()  # levels that loss or settings have called

    def step(self, *micro_batches: Any) -> Tensor:
        """One optimizer step on the mean loss of the micro-batches; returns it. All ranks call.

        Steps count into the present cycle, until `clear` begins the next.

        Raises:
            ValueError: as `backward`.
        """
        loss = self.backward(*micro_batches)
        self.apply()
        return loss

    def backward(self, *micro_batches: Any) -> Tensor:
        """The first half of `step`: leave the gradient in the model, and return the mean loss.

        Raises:
            ValueError: the loss is no scalar, the engine accumulates another number, or the
                level's problems bind a name in `lower` or `upper` to different levels.
        """
        self._check_number(micro_batches)
        bindings = self._bindings_to_serve()
        self._pending = pending = _Pending(bindings, bindings[0].moves())
        losses = []
        for i, batch in enumerate(micro_batches):
            loss = self._loss_of_step(batch, pending)
            losses.append(loss.detach())
            if self.is_engine:
                self.model.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
                self.model.backward(loss)
            else:
                (loss / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
        return torch.stack(losses).mean()

    def apply(self) -> None:
        """The second half of `step`: the optimizer step, recorded if it will be needed.

        Along a gradient that came from `set_gradient` it is not recorded.
        """
        pending = self._take_pending()
        if self.settings is not None:
            with torch.no_grad(), pending.bindings[0].constants() as models:
                self._set_settings(self.settings(self._called(models)))
        self._check_used()
        wanting = [b for b in pending.bindings if pending.micro_batches and b.wants_record]
        if wanting:
            self._take_recorded_step(wanting, pending)
        else:
            self._take_step()
            self.num_moves += 1
        for binding in pending.bindings:
            binding.num_taken += 1

    def discard(self) -> None:
        """Instead of `apply`: take no step, and forget the gradient and this cycle's records."""
        self.partition.clear_gradients()
        for binding in self._take_pending().bindings:
            binding.records.clear()
            binding.num_taken += 1

    @property
    def bindings(self) -> list["Binding"]:
        """One for each problem that the level is in, in the order in which these were made."""
        return [binding for ref in self._bindings if (binding := ref()) is not None]

    @property
    def window(self) -> int:
        """How many of a cycle's newest steps are recorded, for the problem that asks for most."""
        return max((binding.window for binding in self.bindings), default=0)

    @property
    def records(self) -> list[StepRecord]:
        """This cycle's recorded steps, oldest first, of the problem that has most of them."""
        return max((list(binding.records) for binding in self.bindings), key=len, default=[])

    @property
    def is_recorded(self) -> bool:
        """Whether this cycle's steps were recorded as far as the estimators ask for."""
        return all(binding.is_recorded for binding in self.bindings)

    def clear(self) -> None:
        """Forget the recorded steps, those of all problems: a new cycle begins."""
        self._pending = None
        for binding in self.bindings:
            binding.clear()

    def join(self, binding: "Binding") -> None:
        """Make steps count for another problem, as long as it keeps its binding."""
        self._bindings = [weakref.ref(other) for other in (*self.bindings, binding)]

    @contextmanager
    def serving(self, binding: "Binding") -> Iterator[None]:
        """Inside, steps are those of one problem, and of others that bind the level alike."""
        self._served = binding
        try:
            yield
        finally:
            self._served = None

    def set_gradient(self, vector: Vector) -> None:
        """Make a vector the gradient that `apply` uses. All ranks must call."""
        self._pending = None  # the gradient is no longer that of the loss of `backward`
        self.partition.set_gradient(vector)

    def step_with_hypergradient(self, hypergradient: Hypergradient) -> None:
        """Step along a hypergradient in place of the gradient of the loss. All ranks must call."""
        self.set_gradient(hypergradient.vector)
        self.apply()

    def named(self, vector: Vector) -> dict[str, Tensor]:
        """A vector as whole tensors by parameter name, on every rank. All ranks must call."""
        return self.partition.gather(list(self.partition.shapes), vector)[0]

    def evaluate(self, models: Models, micro_batch: MicroBatch) -> Tensor:
        """The loss, scalar and of this rank; notes what a `WeightedLoss` wants frozen."""
        models = self._called(models)
        if isinstance(self.loss, WeightedLoss):
            losses, frozen = self.loss.losses(models, micro_batch.batch)
            micro_batch.frozen = tree_map_only(Tensor, torch.detach, frozen)
            loss = (self.loss.weights(models, micro_batch.frozen) * losses).sum()
        elif isinstance(self.loss, ReplayedLoss):
            loss, choice = self.loss.loss(models, micro_batch.batch, micro_batch.frozen)
            micro_batch.frozen = tree_map_only(Tensor, torch.detach, choice)
        else:
            loss = self.loss(models, micro_batch.batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of level {self.name} must be a scalar, got {shape}")
        return loss

    def _loss_of_step(self, batch: Any, pending: "_Pending") -> Tensor:
        binding = pending.bindings[0]  # they all read the same levels
        micro_batch = binding.micro_batch(batch)
        keeps = {n for b in pending.bindings if b.is_last_step for n in b.keeps}
        if keeps:
            micro_batch.kept = KeptCalls()
        with binding.constants(micro_batch.kept, keeps) as models:
            loss = self.evaluate({**models, self.name: self.model}, micro_batch)
        if any(b.window for b in pending.bindings):
            pending.micro_batches.append(micro_batch)
        return loss

    def _bindings_to_serve(self) -> list["Binding"]:
        """Those of the problems whose step it is; one to itself where there is no problem."""
        bindings = self.bindings
        first = self._served or (bindings[0] if bindings else Binding(self, {}))
        alike = [b for b in bindings if b.others == first.others]
        if self._served is None and len(alike) < len(bindings):
            names = {n for b in bindings for n, lv in b.others.items() if lv is not first.others[n]}
            raise ValueError(
                f"level {self.name} is in several problems that mean different levels by "
                f"{', '.join(sorted(names))}, so its step could be for any of them; call "
                f"step({self.name!r}, ...) of the problem it is for, or drop the other problems"
            )
        return alike or [first]

    def _take_pending(self) -> "_Pending":
        """What `backward` left for the step; a gradient that was set has no loss to record."""
        pending, self._pending = self._pending, None
        if pending is not None:
            return pending
        return _Pending(self._bindings_to_serve() if self.settings else self.bindings, {})

    def _called(self, models: Models) -> CalledModels:
        """The models that loss or settings may use; notes which they do."""
        return CalledModels(models, self.name, (*self.lower, *self.upper), self._used)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step in a cycle run by `Multilevel`."""
        return int(self.model.gradient_accumulation_steps()) if self.is_engine else 1

    def _check_used(self) -> None:
        for name in self.upper:
            if name not in self._used:
                raise ValueError(
                    f"level {self.name} names {name} in upper, but its loss never uses "
                    f"models[{name!r}]; use it there, or leave it out of upper"
                )

    def _check_number(self, micro_batches: Sequence[Any]) -> None:
        wanted = self.num_micro_batches if self.is_engine else max(1, len(micro_batches))
        if len(micro_batches) != wanted:
            raise ValueError(
                f"level {self.name} got {len(micro_batches)} micro-batches, but needs {wanted}"
            )

    def _set_settings(self, settings: Settings) -> None:
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            for key, value in values.items():
                if key not in ("lr", "weight_decay"):
                    raise ValueError(f"settings of level {self.name}: use lr and weight_decay only")
                group[key] = float(value)

    def _take_recorded_step(self, bindings: Sequence["Binding"], pending: "_Pending") -> None:
        make_room(binding.records for binding in bindings)
        with self._recording(pending) as record:
            self._take_step()
        if record.steps:  # an engine skips a step with bad numbers
            self.num_moves += 1
            for binding in bindings:
                binding.records.append(record)

    def _recording(self, pending: "_Pending") -> AbstractContextManager[StepRecord]:
        # `_take_step` lets go of a module's gradients, so they can be kept as they are, but SGD may
        # write into them, and engines use their memory again.
        owns_gradients = not self.is_engine and type(self.optimizer) is not torch.optim.SGD
        return recording(
            self.partition,
            pending.micro_batches,
            pending.moves,
            clips=bool(self.max_norm),
            owns_gradients=owns_gradients,
        )

    def _take_step(self) -> None:
        if self.is_engine:
            self.model.step()
            return
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.partition.params.values(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()


class Binding:
    """A level's place in one problem, which owns this: what the level reads, and its records.

    Args:
        level: whose place it is.
        others: the levels that it names in `lower` and `upper`, by name.
        window: newest steps of a cycle to record.
        keeps: levels below whose calls in the cycle's last step are kept for the hypergradient.

    Attributes:
        records: the newest recorded steps of this cycle, oldest first, at most `window`.
        num_taken: steps of this cycle.
    """

    def __init__(
        self,
        level: Level,
        others: Mapping[str, Level],
        window: int = 0,
        keeps: Sequence[str] = (),
    ) -> None:
        self.level = level
        self.others = dict(others)
        self.window = window
        self.keeps = tuple(keeps)
        self.records: deque[StepRecord] = deque(maxlen=window)
        # In mid-cycle it joins the cycle of a problem that binds the level alike.
        alike = (b.num_taken for b in level.bindings if b.others == self.others)
        self.num_taken: int = max(alike, default=0)

    @property
    def is_recorded(self) -> bool:
        """Whether this cycle's steps were recorded as far as this problem's estimator asks for."""
        return len(self.records) == self.window

    @property
    def wants_record(self) -> bool:
        """Whether the next step is among those to record."""
        return self.window > 0 and self.num_taken >= self.level.num_steps - self.window

    @property
    def is_last_step(self) -> bool:
        """Whether the next step ends the cycle."""
        return self.num_taken == self.level.num_steps - 1

    def clear(self) -> None:
        """Forget the recorded steps: a new cycle begins."""
        self.records.clear()
        self.num_taken = 0

    def moves(self) -> dict[str, int]:
        """How many steps the weights have taken that the level's loss reads, by level name."""
        return {level.name: level.num_moves for level in (self.level, *self.others.values())}

    def micro_batch(self, batch: Any) -> MicroBatch:
        """A batch with the present random state and modes."""
        levels = (self.level, *self.others.values())
        modes = {level.name: level.twin.modes() for level in levels}
        return MicroBatch(batch, RandomState.now(self.level.partition.device), modes)

    def weights_of_others(self, sinks: Mapping[str, GradientSink]) -> dict[str, Weights]:
        """The other levels' live weights; those without a sink are constants."""
        return {
            name: Weights(other.twin, other.partition, sink=sinks.get(name))
            for name, other in self.others.items()
        }

    @contextmanager
    def constants(
        self, kept: KeptCalls | None = None, keeps: Collection[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """The models of the other levels, whose weights are constants.

        Args:
            kept: keeps the calls of the levels in `keeps`.
        """
        with ExitStack() as stack:
            models: dict[str, Any] = {}
            for name, other in self.others.items():
                keeper = kept if name in keeps else None
                sink = keeper.sink(name) if keeper else None
                weights = Weights(other.twin, other.partition, sink=sink)
                models[name] = stack.enter_context(other.twin.bound(weights))
                if keeper:
                    device = other.partition.device
                    models[name] = keeper.recording(name, other.twin, weights, device)
            yield models


@dataclass
class _Pending:
    """A step between its two halves: for which problems it is, and what it was computed from."""

    bindings: list[Binding]
    moves: dict[str, int]
    micro_batches: list[MicroBatch] = field(default_factory=list)
