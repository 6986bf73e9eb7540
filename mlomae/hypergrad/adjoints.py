"""Reverse-mode derivatives of optimizer steps, elementwise and without communication.

A step maps weights w, what the optimizer remembers, and the gradient g to new weights and a new
memory. Walking back over the steps, each shard carries the adjoint dF/dw of a scalar F and the
adjoint of the optimizer's memory; passing a step yields the cotangent c = dF/dg of its gradient.
Everything acts on any slice of the weights, so on a ZeRO shard it runs as it stands.

The part of dF/dw that comes through g = dL/dw is the Hessian product; the caller adds it, since it
needs the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ShardStep:
    """What one optimizer step did to one shard.

    Attributes:
        grad: g as the optimizer used it (reduced, unscaled, clipped), flat.
        settings: hyperparameters of the shard's parameter group at the step.
        group: index of that group.
        is_first: whether the optimizer had no state of this shard before.
        state: the optimizer's memory *after* the step, flat, and its `step` count.
    """

    grad: Tensor
    settings: dict[str, Any]
    group: int
    is_first: bool
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class ShardAdjoint:
    """Adjoint of a shard's weights and of what the optimizer remembers of it.

    `by_setting` holds the derivative by each setting element by element; its sum over the elements
    of a parameter group is the derivative by that group's setting.
    """

    weight: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    by_setting: dict[str, Tensor] = field(default_factory=dict)

    def let_go(self) -> None:
        """Free what only an older step would need."""
        self.weight, self.memory = self.weight.new_empty(0), {}


def through_sgd(
    adjoint: ShardAdjoint,
    step: ShardStep,
    weight: Tensor | None = None,
    *,
    with_settings: bool = False,
) -> Tensor:
    """Pass a step of `torch.optim.SGD`: g' = g + decay w, b = momentum b + (1 - dampening) g'.

    w' = w - lr b, or w - lr (g' + momentum b) with Nesterov's momentum. The first step sets b = g'.

    Args:
        adjoint: of w' and b; becomes the adjoint of the w and b before the step, without the part
            that comes through the gradient.
        step: the recorded step.
        weight: w; only needed for Adam's weight decay and for the settings.
        with_settings: leave the derivative by the settings in the adjoint.

    Returns:
        The cotangent of g.
    """
    s = step.settings
    lr, momentum, decay = float(s["lr"]), s["momentum"], float(s["weight_decay"])
    direct = adjoint.weight * -lr
    cotangent = direct
    if momentum:
        of_buffer = adjoint.memory.pop("momentum_buffer", 0.0)
        of_buffer = of_buffer + (momentum * direct if s["nesterov"] else direct)
        share = 1.0 if step.is_first else 1.0 - s["dampening"]
        cotangent = of_buffer * share + (direct if s["nesterov"] else 0.0)
        if not step.is_first:
            adjoint.memory["momentum_buffer"] = momentum * of_buffer
    if with_settings and weight is not None:
        grad = step.grad + decay * weight
        direction = step.state["momentum_buffer"] if momentum else grad
        if s["nesterov"]:
            direction = grad + momentum * direction
        adjoint.by_setting = {"lr": -adjoint.weight * direction, "weight_decay": cotangent * weight}
    if decay:
        adjoint.weight = adjoint.weight + decay * cotangent
    return cotangent


def through_adam(
    adjoint: ShardAdjoint,
    step: ShardStep,
    weight: Tensor | None = None,
    *,
    with_settings: bool = False,
) -> Tensor:
    """Pass a step of `torch.optim.AdamW` or `Adam`, through both moments.

    With b1 = 1 - beta1^t, b2 = 1 - beta2^t, S = sqrt(v / b2) and Q = S + eps the step is
    w' = (1 - lr * decay) w - lr (m / b1) / Q; Adam adds decay * w to the gradient instead. So

        dF/dm += -lr dF/dw' / (b1 Q),    dF/dv += lr dF/dw' (m / b1) / (2 b2 S Q^2),
        c = (1 - beta1) dF/dm + 2 (1 - beta2) g dF/dv.

    Where v is zero the weight never had a gradient and its root has no derivative: this step's part
    is then zero.

    Args, returns: as `through_sgd`, for w' and the moments m and v.

    Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv 1711.05101.
    """
    s, state = step.settings, step.state
    lr, decay, (beta1, beta2) = float(s["lr"]), float(s["weight_decay"]), s["betas"]
    is_decoupled = bool(s.get("decoupled_weight_decay", False))
    correction1 = 1 - float(beta1) ** state["step"]
    correction2 = 1 - float(beta2) ** state["step"]
    root = (state["exp_avg_sq"] / correction2).sqrt()
    has_gradient = root > 0
    root = torch.where(has_gradient, root, torch.ones_like(root))
    denominator = root + s["eps"]
    update = state["exp_avg"] / correction1 / denominator

    moved = torch.where(has_gradient, adjoint.weight, torch.zeros_like(adjoint.weight))
    of_first = moved / denominator * (-lr / correction1)
    of_second = moved * update / root / denominator * (lr / (2 * correction2))
    # A gradient that is zero now still counts in later steps.
    of_first += adjoint.memory.pop("exp_avg", 0.0)
    of_second += adjoint.memory.pop("exp_avg_sq", 0.0)
    grad = step.grad
    if decay and not is_decoupled:
        assert weight is not None
        grad = grad + decay * weight
    cotangent: Tensor = (1 - beta1) * of_first + 2 * (1 - beta2) * grad * of_second
    adjoint.memory = {"exp_avg": beta1 * of_first, "exp_avg_sq": beta2 * of_second}

    if with_settings and weight is not None:
        shrink = decay * weight if is_decoupled else 0.0
        by_decay = -lr * adjoint.weight if is_decoupled else cotangent
        adjoint.by_setting = {
            "lr": -adjoint.weight * (update + shrink),
            "weight_decay": by_decay * weight,
        }
    if decay:
        change = -lr * decay * adjoint.weight if is_decoupled else decay * cotangent
        adjoint.weight = adjoint.weight + change
    return cotangent


def through_clipping(
    cotangent: Tensor, clipped_grad: Tensor, inner_product: float, *, norm: float, max_norm: float
) -> Tensor:
    """Cotangent of the gradient before clipping by global norm, from the one after it.

    Clipping scales g by s = max_norm / (norm + 1e-6) when that is below 1, so for norm n

        c = s * c~ - <g, c~> s / (n (n + 1e-6)) * g,   with g = g~ / s.

    Args:
        cotangent: c~ on this shard.
        clipped_grad: g~ on this shard.
        inner_product: <g~, c~> over all shards and ranks.
        norm: global norm before clipping.
        max_norm: the threshold.
    """
    scale = max_norm / (norm + 1e-6)
    if scale >= 1:
        return cotangent
    grad = clipped_grad / scale
    return scale * cotangent - (inner_product / (norm * (norm + 1e-6))) * grad


Adjoint = Callable[..., Tensor]
_ADJOINTS: dict[type[torch.optim.Optimizer], Adjoint] = {
    torch.optim.SGD: through_sgd,
    torch.optim.Adam: through_adam,
    torch.optim.AdamW: through_adam,
}


def adjoint_of(optimizer: torch.optim.Optimizer) -> Adjoint:
    """The adjoint of an optimizer's step.

    Raises:
        ValueError: there is none for this optimizer or for one of its options.
    """
    if type(optimizer) not in _ADJOINTS:
        raise ValueError(
            f"{type(optimizer).__name__} has no adjoint here; use torch.optim.SGD, Adam or AdamW, "
            "or an estimator that does not differentiate the optimizer, such as Identity()"
        )
    for option in ("amsgrad", "maximize"):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"{option}=True has no adjoint here; switch it off")
    return _ADJOINTS[type(optimizer)]


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that the optimizer's adjoint reads of its state."""
    return ("momentum_buffer",) if type(optimizer) is torch.optim.SGD else ("exp_avg", "exp_avg_sq")
