"""Reverse-mode derivatives of optimizer steps, elementwise and without communication.

One step maps the gradient g to new weights w'. Each function here takes the adjoint a = dF/dw' of
a scalar F and returns the cotangent c = (dw'/dg)^T a. They work on any slice of the weights, so on
a ZeRO shard they run as they stand.
"""

import torch
from torch import Tensor


def sgd_cotangent(
    adjoint: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
) -> Tensor:
    """Cotangent of the gradient for `torch.optim.SGD`: w' = w - lr * (buffer of g).

    Weight decay adds a multiple of w to g and leaves the derivative by g as it is.

    Args:
        adjoint: dF/dw', any shape.
        lr, momentum, dampening, nesterov: settings of the parameter group at this step.
        first_step: whether the momentum buffer was made by this step (it is then g itself).
    """
    share = 1.0
    if momentum and not first_step:
        share = 1.0 - dampening
    if nesterov:
        share = 1.0 + momentum * share
    return adjoint * (-lr * share)


def adamw_cotangent(
    adjoint: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: float,
) -> Tensor:
    """Cotangent of the gradient for `torch.optim.AdamW`, through both moments.

    With b1 = 1 - beta1^t, b2 = 1 - beta2^t, S = sqrt(v / b2) and Q = S + eps, the step is
    w' = (1 - lr * decay) w - lr (m / b1) / Q, and

        dw'/dg = -lr [(1 - beta1) / (b1 Q) - (1 - beta2) g (m / b1) / (b2 S Q^2)].

    Decoupled decay does not enter. Where v is zero the weight never had a gradient, the second
    term is 0/0, and the cotangent is set to zero.

    Args:
        adjoint: dF/dw'.
        grad: g as the optimizer used it (reduced, unscaled, clipped); same shape.
        exp_avg, exp_avg_sq: m and v *after* the step.
        lr, betas, eps: settings of the parameter group at this step.
        step: t, counted from 1.

    Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv 1711.05101.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    root = (exp_avg_sq / correction2).sqrt()
    denominator = root + eps
    through_first = (1 - beta1) / (correction1 * denominator)
    through_second = (
        (1 - beta2) * grad * exp_avg / (correction1 * correction2 * root * denominator.square())
    )
    cotangent = adjoint * (through_first - through_second) * -lr
    return torch.where(root > 0, cotangent, torch.zeros_like(cotangent))


def clipping_cotangent(
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
        max_norm: the threshold (`gradient_clipping`).
    """
    scale = max_norm / (norm + 1e-6)
    if scale >= 1:
        return cotangent
    grad = clipped_grad / scale
    return scale * cotangent - (inner_product / (norm * (norm + 1e-6))) * grad
