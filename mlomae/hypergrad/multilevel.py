"""A problem of several levels: who depends on whom, and the sweep that yields a hypergradient."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor

from mlomae.hypergrad.estimators import Estimator, Unrolled
from mlomae.hypergrad.level import Binding, Level
from mlomae.hypergrad.losses import ReplayedLoss, WeightedLoss
from mlomae.hypergrad.randomness import restored
from mlomae.hypergrad.records import Hypergradient
from mlomae.hypergrad.twin import GradientSink, Weights, running


class Multilevel:
    """Levels that depend on each other, and the estimator of their hypergradients.

    A cycle runs the levels from the lowest up: each takes its steps with the others held fixed,
    then every upper level, whose weights are hyperparameters below, takes one along its
    hypergradient.

    A level may be in several problems at once, such as one for each of several estimators. Its step
    is recorded for all that bind it to the same other levels; where they do not, it is stepped by
    `step` of one problem, and the hypergradients of the others are refused until it is stepped for
    them again. The records go with the problem: keep a reference to it. All ranks must make and
    drop problems alike.

    Args:
        levels: in any order.
        estimator: how hypergradients are computed.
        keep_activations: keep what a level's last step computed with the models below until the
            hypergradient, instead of computing it again: faster, but those activations are then
            in memory together with those of the upper level's loss.

    Raises:
        ValueError: the graph of levels has a cycle, an upper level has no influence below, a level
            takes fewer steps than the estimator asks for, or the estimator cannot work with a
            level's optimizer, model or precision. All ranks must construct alike.
    """

    def __init__(
        self,
        levels: Iterable[Level],
        *,
        estimator: Estimator | None = None,
        keep_activations: bool = True,
    ) -> None:
        self.estimator = estimator or Unrolled(steps=1)
        members = list(levels)
        self.levels = {level.name: level for level in members}
        if len(self.levels) != len(members):
            raise ValueError("two levels have the same name; rename one")
        _check_names(self.levels)
        _check_weights(members)
        self._order = _lowest_first(self.levels)
        self.uppers = [n for n in self._order if any(n in lv.upper for lv in members)]
        _check_uppers(self.levels, self.uppers)
        self._bindings = self._bind(keep_activations)
        for level in members:  # once nothing can be refused any more
            level.join(self._bindings[level.name])

    def step(self, name: str, *micro_batches: object) -> Tensor:
        """One step of a level in this problem, whatever others it is in; returns its mean loss.

        All ranks must call.

        Raises:
            ValueError: there is no such level, or as `Level.step`.
        """
        if name not in self.levels:
            raise ValueError(f"{name!r} is no level; there are {', '.join(self.levels)}")
        level = self.levels[name]
        with level.serving(self._bindings[name]):
            return level.step(*micro_batches)

    def is_recorded(self, *names: str) -> bool:
        """Whether these levels' steps of the cycle are recorded as far as the estimator asks."""
        return all(self._bindings[name].is_recorded for name in names)

    def hypergradient(self, upper: str, *micro_batches: object) -> Hypergradient:
        """Derivative of an upper level's loss by its weights, through the recorded steps below.

        No level changes: no weight, optimizer state, counter, gradient or random state. All ranks
        must call, after the steps of the levels below and before any further one.

        Args:
            upper: the level's name.
            micro_batches: its loss is the mean over them.

        Raises:
            RuntimeError: a level below has taken too few steps in this cycle.
            ValueError: there is no such upper level or no micro-batch, a loss is no scalar, no
                loss below calls the upper level's model, or a level has taken a step which this
                problem did not record.
        """
        if upper not in self.uppers:
            raise ValueError(f"{upper!r} is no upper level; there are {', '.join(self.uppers)}")
        if not micro_batches:
            raise ValueError(f"level {upper} needs at least one micro-batch for its hypergradient")
        target = self._bindings[upper]
        below = self._between(upper)
        sinks = {name: GradientSink(self.levels[name].partition) for name in (*below, upper)}
        with restored(target.level.partition.device), torch.enable_grad():
            losses = [
                self._top(target, batch, len(micro_batches), sinks) for batch in micro_batches
            ]
            for name in reversed(below):
                binding, sink = self._bindings[name], sinks.pop(name)
                wanted = {n: sinks[n] for n in binding.others if n in sinks}
                self.estimator.push(binding, sink.take(), wanted)
        if not sinks[upper].is_reached:
            raise ValueError(
                f"no loss below uses models[{upper!r}] differentiably, so level {upper} has no "
                "hypergradient; use it there, or leave it out of upper"
            )
        return Hypergradient(torch.stack(losses).mean(), sinks[upper].take())

    def cycle(self, batches: Mapping[str, Iterator[object]]) -> dict[str, Tensor]:
        """One cycle of all levels. All ranks must call.

        Args:
            batches: an iterator of micro-batches for each level.

        Returns:
            The mean loss of each level on this rank, by name.
        """
        self.clear()  # of steps that belong to another problem's cycle
        losses = {}
        for name in self._order:
            if name not in self.uppers:
                steps = [
                    self.step(name, *self._next(name, batches))
                    for _ in range(self.levels[name].num_steps)
                ]
                losses[name] = torch.stack(steps).mean()
        results = {
            name: self.hypergradient(name, *self._next(name, batches)) for name in self.uppers
        }
        for name, result in results.items():  # after all are known: one may depend on another
            losses[name] = result.loss
            with self.levels[name].serving(self._bindings[name]):
                self.levels[name].step_with_hypergradient(result)
        self.clear()
        return losses

    def clear(self) -> None:
        """Forget the recorded steps of all levels: the next cycle begins."""
        for binding in self._bindings.values():
            binding.clear()

    def _top(
        self, target: Binding, batch: object, num: int, sinks: dict[str, GradientSink]
    ) -> Tensor:
        level, micro_batch = target.level, target.micro_batch(batch)
        weights = Weights(level.twin, level.partition, sink=sinks[level.name])
        sources = {level.name: weights, **target.weights_of_others(sinks)}
        with running(sources, micro_batch.modes) as models:
            loss = level.evaluate(models, micro_batch)
            (loss / num).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _between(self, upper: str) -> list[str]:
        """Levels that the upper level's weights influence and its loss depends on, lowest first."""
        influenced: list[str] = []
        for name in self._order:
            level = self.levels[name]
            if upper in level.upper or any(n in influenced for n in level.lower):
                influenced.append(name)
        return [n for n in influenced if n in _below(self.levels, upper)]

    def _bind(self, keep_activations: bool) -> dict[str, Binding]:
        between = self._check_between()
        reuses = keep_activations and self.estimator.reuses_activations
        bindings = {}
        for name, level in self.levels.items():
            others = {n: self.levels[n] for n in (*level.lower, *level.upper)}
            window = self.estimator.window(level) if name in between else 0
            # With what it froze or chose, such a loss may make other calls than in its step.
            repeats = isinstance(level.loss, (WeightedLoss, ReplayedLoss))
            keeps = window and reuses and not repeats
            kept = [n for n in level.lower if keeps and n in between]
            bindings[name] = Binding(level, others, window, kept)
        return bindings

    def _check_between(self) -> list[str]:
        """Levels whose steps are differentiated, which the estimator must be able to."""
        between = {name: upper for upper in self.uppers for name in self._between(upper)}
        for name, upper in between.items():
            level = self.levels[name]
            if name in self.uppers:
                raise ValueError(
                    f"level {name} takes hypergradient steps itself, and level {upper} would have "
                    f"to differentiate through them, which needs third derivatives; take {name} "
                    f"out of what {upper} depends on, or train both in one level"
                )
            self.estimator.check(level)
        return list(between)

    def _next(self, name: str, batches: Mapping[str, Iterator[object]]) -> list[object]:
        return [next(batches[name]) for _ in range(self.levels[name].num_micro_batches)]


def _check_names(levels: Mapping[str, Level]) -> None:
    for level in levels.values():
        for name in (*level.lower, *level.upper):
            if name not in levels or name == level.name:
                raise ValueError(
                    f"level {level.name} names {name!r} in lower or upper, which is no other "
                    f"level; there are {', '.join(levels)}"
                )
        if both := set(level.lower) & set(level.upper):
            raise ValueError(
                f"level {level.name} names {both.pop()!r} in lower and in upper; leave it in one"
            )


def _check_weights(levels: Sequence[Level]) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for level in levels:
        for name, param in level.partition.params.items():
            other, other_name = owners.setdefault(id(param), (level.name, name))
            if other != level.name:
                raise ValueError(
                    f"levels {other} and {level.name} both train the same weight ({other_name}, "
                    f"{name}); leave it to one of them, whose model the other calls"
                )


def _lowest_first(levels: Mapping[str, Level]) -> list[str]:
    try:
        return list(TopologicalSorter({n: lv.lower for n, lv in levels.items()}).static_order())
    except CycleError as error:
        path = " -> ".join(reversed(error.args[1]))
        raise ValueError(
            f"the levels depend on each other in a cycle, {path}; remove one of these lower="
        ) from None


def _below(levels: Mapping[str, Level], name: str) -> set[str]:
    """All levels that a level's loss depends on, directly or through others."""
    below: set[str] = set()
    for lower in levels[name].lower:
        below |= {lower} | _below(levels, lower)
    return below


def _check_uppers(levels: Mapping[str, Level], uppers: Sequence[str]) -> None:
    for level in levels.values():
        for upper in level.upper:
            if level.name not in _below(levels, upper):
                raise ValueError(
                    f"level {level.name} names {upper} in upper, but the loss of {upper} does not "
                    f"depend on {level.name}; add it to lower of {upper} or of a level below it"
                )
        is_top = not any(level.name in other.lower for other in levels.values())
        if is_top and level.name not in uppers:
            raise ValueError(
                f"no loss below depends on the weights of level {level.name}; name it in upper of "
                "a level whose loss uses it"
            )
