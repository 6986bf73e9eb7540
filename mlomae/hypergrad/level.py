"""One level of a multilevel problem: its model, its loss, and what it records of its steps."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mlomae.hypergrad.kept import KeptCalls
from mlomae.hypergrad.losses import Loss, Models, ReplayedLoss, Settings, WeightedLoss
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.randomness import RandomState
from mlomae.hypergrad.records import MicroBatch, StepRecord, recording
from mlomae.hypergrad.twin import Twin, Weights
from mlomae.hypergrad.zero_partitions import partition_of


class Level:
    """A model with its optimizer, its loss and its place among the other levels.

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
        self.others: dict[str, Level] = {}  # those of `lower` and `upper`, set by `Multilevel`
        self.window = 0  # newest steps of a cycle to record, set by `Multilevel`
        self.keeps: tuple[str, ...] = ()  # levels whose calls are kept, set by `Multilevel`
        self.records: deque[StepRecord] = deque(maxlen=0)
        self._num_taken = 0  # in this cycle
        self._used: set[str] = set()  # levels that loss or settings have called
        self._waiting: list[MicroBatch] = []

    def step(self, *micro_batches: Any) -> Tensor:
        """One optimizer step on the mean loss of the micro-batches; returns it. All ranks call.

        Steps count into the present cycle, until `clear` begins the next.
        """
        loss = self.backward(*micro_batches)
        self.apply()
        return loss

    def backward(self, *micro_batches: Any) -> Tensor:
        """The first half of `step`: leave the gradient in the model, and return the mean loss.

        Raises:
            ValueError: the loss is no scalar, or the engine accumulates another number.
        """
        self._check_number(micro_batches)
        self._waiting = []
        losses = []
        for i, batch in enumerate(micro_batches):
            loss = self._loss_of_step(batch)
            losses.append(loss.detach())
            if self.is_engine:
                self.model.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
                self.model.backward(loss)
            else:
                (loss / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
        return torch.stack(losses).mean()

    def apply(self) -> None:
        """The second half of `step`: the optimizer step, recorded if it will be needed."""
        if self.settings is not None:
            with torch.no_grad(), self.constants() as models:
                self._set_settings(self.settings(_Models(models, self)))
        self._check_used()
        is_recorded = self.window > 0 and self._num_taken >= self.num_steps - self.window
        with self._recording() if is_recorded else nullcontext():
            self._take_step()
        self._num_taken += 1

    def discard(self) -> None:
        """Instead of `apply`: take no step, and forget the gradient and this cycle's records."""
        self.partition.clear_gradients()
        self.records.clear()
        self._num_taken += 1

    @property
    def is_recorded(self) -> bool:
        """Whether this cycle's steps were recorded as far as the estimator asks for."""
        return len(self.records) == self.window

    def clear(self) -> None:
        """Forget the recorded steps: a new cycle begins."""
        self.records.clear()
        self._waiting = []
        self._num_taken = 0

    def set_gradient(self, vector: Vector) -> None:
        """Make a vector the gradient that `apply` uses. All ranks must call."""
        self.partition.set_gradient(vector)

    def named(self, vector: Vector) -> dict[str, Tensor]:
        """A vector as whole tensors by parameter name, on every rank. All ranks must call."""
        return self.partition.gather(list(self.partition.shapes), vector)[0]

    @contextmanager
    def constants(self, kept: KeptCalls | None = None) -> Iterator[dict[str, Any]]:
        """The models of the other levels, whose weights are constants.

        Args:
            kept: keeps the calls of the levels in `keeps`.
        """
        with ExitStack() as stack:
            models: dict[str, Any] = {}
            for name, other in self.others.items():
                keeps = kept is not None and name in self.keeps
                sink = kept.sink(name) if kept is not None and keeps else None
                weights = Weights(other.twin, other.partition, sink=sink)
                models[name] = stack.enter_context(other.twin.bound(weights))
                if kept is not None and keeps:
                    device = other.partition.device
                    models[name] = kept.recording(name, other.twin, weights, device)
            yield models

    def evaluate(self, models: Models, micro_batch: MicroBatch) -> Tensor:
        """The loss, scalar and of this rank; notes what a `WeightedLoss` wants frozen."""
        models = _Models(models, self)
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

    def micro_batch(self, batch: Any) -> MicroBatch:
        """A batch with the present random state and modes."""
        modes = {name: other.twin.modes() for name, other in self.others.items()}
        modes[self.name] = self.twin.modes()
        return MicroBatch(batch, RandomState.now(self.partition.device), modes)

    def _loss_of_step(self, batch: Any) -> Tensor:
        micro_batch = self.micro_batch(batch)
        if self._is_last_step:
            micro_batch.kept = KeptCalls()
        with self.constants(micro_batch.kept) as models:
            loss = self.evaluate({**models, self.name: self.model}, micro_batch)
        if self.window:
            self._waiting.append(micro_batch)
        return loss

    @property
    def _is_last_step(self) -> bool:
        return bool(self.keeps) and self._num_taken == self.num_steps - 1

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

    def _recording(self) -> AbstractContextManager[None]:
        # `_take_step` lets go of a module's gradients, so they can be kept as they are, but SGD may
        # write into them, and engines use their memory again.
        owns_gradients = not self.is_engine and type(self.optimizer) is not torch.optim.SGD
        return recording(
            self.partition,
            self.records,
            self._waiting,
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


class _Models(dict[str, Any]):
    """Models by level name, with an error that says how to reach a missing one."""

    def __init__(self, models: Models, level: Level) -> None:
        super().__init__(models)
        self._level = level

    def __getitem__(self, name: str) -> Any:
        self._level._used.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"the loss of level {self._level.name} uses models[{name!r}]; name that level in its "
            "lower or upper"
        )
