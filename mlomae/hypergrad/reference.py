"""An independent float64 reference: explicitly unrolled optimizer steps, left to autograd.

Nothing here uses the rest of `mlomae.hypergrad`: no tangent pass, no adjoint, no shard. Every
optimizer step of every lower level is written out as a function of the weights, each gradient is
taken with `create_graph`, and autograd differentiates the whole. All graphs stay in memory and
attention is the kind that can be differentiated twice, so it serves to check small problems.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

Weights = dict[str, Tensor]
Models = Mapping[str, Callable[..., Any]]
Settings = Mapping[str, Any]
Memory = dict[str, dict[str, Any]]


@dataclass
class OptimizerRules:
    """The settings of one optimizer and what it remembers, by parameter name.

    Attributes:
        kind: "sgd", "adam" (decay as a part of the gradient) or "adamw" (decoupled decay).
        groups: the settings of each parameter group, with the names that torch gives them.
        group_of: index of each parameter's group.
        memory: `momentum_buffer`, or `exp_avg`, `exp_avg_sq` and `step`; absent before the
            first step of a parameter.
        max_norm: gradients are clipped to this global norm; 0 for never.
    """

    kind: str = "sgd"
    groups: list[dict[str, Any]] = field(default_factory=list)
    group_of: dict[str, int] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    max_norm: float = 0.0

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, module: nn.Module, max_norm: float = 0.0
    ) -> "OptimizerRules":
        """What `optimizer` would do to `module` from now on.

        Raises:
            ValueError: the optimizer is not a plain SGD, Adam or AdamW.
        """
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        index = {p: i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        named = {n: p for n, p in module.named_parameters() if p in index}
        memory = {n: dict(optimizer.state[p]) for n, p in named.items() if p in optimizer.state}
        group_of = {n: index[p] for n, p in named.items()}
        return cls(_kind(optimizer), groups, group_of, to_double(memory), max_norm)

    def step(
        self, weights: Weights, grads: Weights, settings: Sequence[Settings], memory: Memory
    ) -> tuple[Weights, Memory]:
        """New weights and memory; like torch's, it leaves weights without a gradient alone."""
        weights, memory = dict(weights), dict(memory)
        for name, grad in _clip(grads, self.max_norm).items():
            group, past = settings[self.group_of[name]], memory.get(name, {})
            if self.kind == "sgd":
                result = _sgd(weights[name], grad, group, past)
            else:
                result = _adam(weights[name], grad, group, past, decoupled=self.kind == "adamw")
            weights[name], memory[name] = result
        return weights, memory


@dataclass
class ReferenceLevel:
    """One level as it stands when this object is made; module and batches are copied in float64.

    Attributes:
        name: what the losses call it.
        module: its model; weights that do not require gradients are constants.
        loss: `loss(models, batch)`, a scalar, which runs `models[name](*args, **kwargs)`.
        batches: the micro-batches of each step to unroll; of the target, of its one evaluation.
        rules: its optimizer; only the levels below the target need one.
        settings: `settings(models)`, for each parameter group the settings that depend on levels
            above, such as {"lr": tensor}.
        schedule: for each step and parameter group the settings that differ from the rules'.
        random_states: for each step and micro-batch the state of the CPU's generator before the
            loss; empty where the loss draws nothing.
    """

    name: str
    module: nn.Module
    loss: Callable[[Models, Any], Tensor]
    batches: Sequence[Sequence[Any]] = ()
    rules: OptimizerRules = field(default_factory=OptimizerRules)
    settings: Callable[[Models], Sequence[Settings]] | None = None
    schedule: Sequence[Sequence[Settings]] = ()
    random_states: Sequence[Sequence[Tensor]] = ()

    def __post_init__(self) -> None:
        self.module = copy.deepcopy(self.module).double()
        self.batches = to_double(list(self.batches))


def hypergradient(
    levels: Sequence[ReferenceLevel], target: str, *, with_hessian: bool = True
) -> Weights:
    """The total derivative of the target's loss by the target's weights.

    The levels listed before the target take the steps for which they have batches, one level
    after the other, each at the newest weights of those before it. Levels listed after the target
    are constants. The gradient of a step is the partial one, by the level's own weights.

    Args:
        levels: lowest first.
        target: name of the upper level.
        with_hessian: whether a step's gradient depends on the level's own weights. Without, the
            truncated estimator remains: mixed products, and the optimizer's own arithmetic.

    Returns:
        The derivative by each of the target's trainable weights, zero where there is none.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        weights = unroll(levels, target, with_hessian=with_hessian)
        return _derivative(levels, weights, target)


def unroll(
    levels: Sequence[ReferenceLevel], target: str, *, with_hessian: bool = True
) -> dict[str, Weights]:
    """The weights of all levels after the steps of those below the target, with their graph."""
    weights = _weights(levels)
    for level in levels[: _position(levels, target)]:
        memory = level.rules.memory
        for index in range(len(level.batches)):
            grads = _gradient(level, levels, weights, index, with_hessian)
            settings = _settings(level, _models(levels, weights), index)
            before = weights[level.name]
            weights[level.name], memory = level.rules.step(before, grads, settings, memory)
    return weights


def relative_error(value: Weights, reference: Weights) -> float:
    """2-norm of the difference over all tensors, relative to the reference."""
    difference = [value[n].double() - r for n, r in reference.items()]
    return float(_norm(difference) / _norm(reference.values()))


def cosine(value: Weights, reference: Weights) -> float:
    """Cosine between two gradients over all tensors."""
    mine = [value[n].double() for n in reference]
    inner = sum((a * b).sum() for a, b in zip(mine, reference.values(), strict=True))
    return float(inner / (_norm(mine) * _norm(reference.values())))


def to_double(value: Any) -> Any:
    """Copy a nest of lists, tuples and dicts with its floating tensors in float64."""

    def widen(tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone()
        return copied.double() if copied.is_floating_point() else copied

    return tree_map_only(Tensor, widen, value)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    kinds = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
    groups, name = optimizer.param_groups, type(optimizer).__name__
    if type(optimizer) not in kinds or any(g.get("amsgrad") or g["maximize"] for g in groups):
        raise ValueError(f"{name}, amsgrad or maximize has no reference; use SGD, Adam or AdamW")
    return "adamw" if groups[0].get("decoupled_weight_decay") else kinds[type(optimizer)]


def _weights(levels: Sequence[ReferenceLevel]) -> dict[str, Weights]:
    def of(module: nn.Module) -> Weights:
        params = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        return {n: p.detach().clone().requires_grad_() for n, p in params}

    return {level.name: of(level.module) for level in levels}


def _position(levels: Sequence[ReferenceLevel], name: str) -> int:
    return [level.name for level in levels].index(name)


def _models(levels: Sequence[ReferenceLevel], weights: Mapping[str, Weights]) -> Models:
    def runner(module: nn.Module, params: Weights) -> Callable[..., Any]:
        return lambda *args, **kwargs: functional_call(module, params, args, kwargs)

    return {level.name: runner(level.module, weights[level.name]) for level in levels}


def _loss(level: ReferenceLevel, models: Models, index: int) -> Tensor:
    losses = []
    for i, batch in enumerate(level.batches[index]):
        if level.random_states:
            torch.set_rng_state(level.random_states[index][i])
        losses.append(level.loss(models, batch))
    return torch.stack(losses).mean()


def _gradient(
    level: ReferenceLevel,
    levels: Sequence[ReferenceLevel],
    weights: Mapping[str, Weights],
    index: int,
    with_hessian: bool,
) -> Weights:
    """The step's gradient by the level's own weights, as far as the loss reads them."""
    # New tensors for the weights: a path to them through the levels below is not the loss's own.
    leaves = {n: w.view_as(w) for n, w in weights[level.name].items()}
    if not with_hessian:
        leaves = {n: w.detach().requires_grad_() for n, w in leaves.items()}
    loss = _loss(level, _models(levels, {**weights, level.name: leaves}), index)
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def _derivative(
    levels: Sequence[ReferenceLevel], weights: Mapping[str, Weights], target: str
) -> Weights:
    loss = _loss(levels[_position(levels, target)], _models(levels, weights), 0)
    theta = weights[target]
    grads = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    return dict(zip(theta, grads, strict=True))


def _settings(level: ReferenceLevel, models: Models, index: int) -> list[dict[str, Any]]:
    settings = level.rules.groups
    changes = [level.schedule[index]] if level.schedule else []
    changes += [level.settings(models)] if level.settings else []
    for change in changes:
        settings = [{**old, **new} for old, new in zip(settings, change, strict=True)]
    return settings


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def _clip(grads: Weights, max_norm: float) -> Weights:
    if not 0 < max_norm < (norm := _norm(grads.values()) + 1e-6):
        return grads
    return {name: grad * (max_norm / norm) for name, grad in grads.items()}


def _sgd(
    weight: Tensor, grad: Tensor, settings: Settings, past: Settings
) -> tuple[Tensor, dict[str, Any]]:
    grad = grad + settings["weight_decay"] * weight
    if not (momentum := settings["momentum"]):
        return weight - settings["lr"] * grad, {}
    buffer = past.get("momentum_buffer")
    buffer = grad if buffer is None else momentum * buffer + (1 - settings["dampening"]) * grad
    direction = grad + momentum * buffer if settings["nesterov"] else buffer
    return weight - settings["lr"] * direction, {"momentum_buffer": buffer}


def _adam(
    weight: Tensor, grad: Tensor, settings: Settings, past: Settings, decoupled: bool
) -> tuple[Tensor, dict[str, Any]]:
    (beta1, beta2), lr, decay = settings["betas"], settings["lr"], settings["weight_decay"]
    if not decoupled:
        grad = grad + decay * weight
    step = float(past.get("step", 0)) + 1
    m = beta1 * past.get("exp_avg", 0) + (1 - beta1) * grad
    v = beta2 * past.get("exp_avg_sq", 0) + (1 - beta2) * grad.square()
    # Where v is zero there never was a gradient: no move, and no derivative of the root.
    root = torch.where(v > 0, v / (1 - beta2**step), torch.ones_like(v)).sqrt()
    move = torch.where(v > 0, m / (1 - beta1**step) / (root + settings["eps"]), 0.0)
    shrunk = weight * (1 - lr * decay) if decoupled else weight
    return shrunk - lr * move, {"exp_avg": m, "exp_avg_sq": v, "step": step}
