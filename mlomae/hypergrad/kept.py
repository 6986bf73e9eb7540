"""Calls of lower levels' models that a step makes, kept with their graph until the reverse sweep.

A level's loss meets a lower level's weights only in the outputs of that level's model: a feature
interface. What a step computed there is what the reverse sweep needs again, so its forward pass is
not repeated: the sweep differentiates down to the outputs, then backpropagates the kept graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from mlomae.hypergrad.randomness import RandomState
from mlomae.hypergrad.twin import GradientSink, Twin, Weights, fetched_again


class _LaterSink:
    """Passes gradients on to a sink that is known only when the sweep comes."""

    target: GradientSink | None = None

    def add(self, name: str, grad: Tensor) -> None:
        if self.target is not None:  # in the step itself these weights are constants
            self.target.add(name, grad)


class _Call:
    """One call: its outputs with their graph, and the random state that it left."""

    def __init__(self, outputs: Any, device: torch.device) -> None:
        self.outputs = outputs
        self.random_state = RandomState.now(device)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # each output with its leaf of the sweep

    def leaf(self, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self.pairs.append((output, leaf))
        return leaf.clone()  # for it may be written into


class KeptCalls:
    """What one micro-batch's loss called of the levels below, for one sweep."""

    def __init__(self) -> None:
        self._calls: dict[str, list[_Call | None]] = {}
        self._sinks: dict[str, _LaterSink] = {}
        self._twins: dict[str, tuple[Twin, Weights, list[bool]]] = {}

    @property
    def names(self) -> list[str]:
        """The levels whose calls are kept."""
        return list(self._calls)

    def sink(self, name: str) -> Any:
        """Takes gradients of a level's weights once the sweep has said where they go."""
        return self._sinks.setdefault(name, _LaterSink())

    def recording(
        self, name: str, twin: Twin, weights: Weights, device: torch.device
    ) -> Callable[..., Any]:
        """A level's bound twin whose calls are kept; what it returns carries no graph."""
        calls = self._calls.setdefault(name, [])
        self._twins[name] = twin, weights, twin.modes()

        def call(*args: Any, **kwargs: Any) -> Any:
            with fetched_again([weights]):
                outputs = twin.root(*args, **kwargs)
            # What was computed from the level's own weights, or from what another call gave, is
            # computed again in the sweep, and so is what has no gradient.
            is_constant = not any(_requires_grad(t) for t in tree_flatten((args, kwargs))[0])
            is_kept = is_constant and torch.is_grad_enabled()
            calls.append(_Call(outputs, device) if is_kept else None)
            return tree_map_only(Tensor, _marked, outputs) if is_kept else outputs

        return call

    def replaying(self, name: str, model: Callable[..., Any]) -> Callable[..., Any]:
        """The level's model in the sweep: leaves in place of outputs, in the order of the calls."""
        calls = iter(self._calls.get(name, []))

        def call(*args: Any, **kwargs: Any) -> Any:
            kept = next(calls, None)
            if kept is None:
                return model(*args, **kwargs)
            kept.random_state.restore()
            return tree_map_only(Tensor, kept.leaf, kept.outputs)

        return call

    def backward(self, sinks: dict[str, GradientSink]) -> None:
        """Backpropagate from the leaves' gradients to the sinks; frees the graphs."""
        for name, calls in self._calls.items():
            self._sinks[name].target = sinks[name]
            pairs = [pair for call in calls if call is not None for pair in call.pairs]
            reached = [pair for pair in pairs if pair[1].grad is not None]
            outputs = [output for output, _ in reached]
            twin, weights, modes = self._twins[name]
            with twin.bound(weights, modes):  # activation checkpointing runs it once more
                torch.autograd.backward(outputs, [leaf.grad for _, leaf in reached])


def _marked(output: Tensor) -> Tensor:
    """A copy without its graph, in whose results it shows that they depend on it."""
    return output.detach().requires_grad_().clone() if output.requires_grad else output


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
