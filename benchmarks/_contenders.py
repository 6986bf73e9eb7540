"""The contenders: each computes one update of the masking network in its own way.

A contender is a function that takes a `Problem` and returns a `Cycle` of two closures. `lower`
takes the autoencoder's and the head's step, with whatever has to be kept of them; `update` then
leaves the hypergradient in the masking network's `grad`. Calling both again runs the next cycle.
To add a contender, write the function and put it into `CONTENDERS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _betty_side import betty_darts
from _problem import Problem, adamw, autoencoder_step, head_step
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlomae.hypergrad import (
    Estimator,
    FiniteDifference,
    Identity,
    Level,
    Multilevel,
    Sama,
    Unrolled,
)

Weights = dict[str, Tensor]


class Cycle(NamedTuple):
    """The two halves of a cycle."""

    lower: Callable[[], None]
    update: Callable[[], None]


Contender = Callable[[Problem], Cycle]


def library(
    estimator: Estimator, *, keep_activations: bool = True, num_micro_batches: int = 1
) -> Contender:
    """`mlomae.hypergrad` on the levels as the training program declares them.

    Args:
        estimator, keep_activations: of `Multilevel`.
        num_micro_batches: parts of the held-out batch, whose activations then take turns.
    """

    def contender(problem: Problem) -> Cycle:
        # Here, so that no other contender carries DeepSpeed in its memory.
        from mlomae.pretraining.masks import MaskedBatch
        from mlomae.pretraining.mlo_mae import FrozenReconstruction, level_losses

        networks = {
            "pretrain": (problem.autoencoder, problem.autoencoder_optimizer),
            "classifier": (problem.head, problem.head_optimizer),
            "mask": (problem.masking, adamw(problem.masking, lr=5e-5)),
        }
        losses = level_losses(FrozenReconstruction())
        levels = {name: Level(name, *networks[name], **losses[name]._asdict()) for name in networks}
        multilevel = Multilevel(
            levels.values(), estimator=estimator, keep_activations=keep_activations
        )

        images, labels = (t.chunk(num_micro_batches) for t in problem.held_out)
        held_out = list(zip(images, labels, strict=True))

        def lower() -> None:
            multilevel.clear()
            levels["pretrain"].step(MaskedBatch(problem.unlabeled, problem.autoencoder.num_keep))
            levels["classifier"].step(problem.labeled)

        def update() -> None:
            hypergradient = multilevel.hypergradient("mask", *held_out)
            levels["mask"].set_gradient(hypergradient.vector)

        return Cycle(lower, update)

    return contender


def double_backward(problem: Problem) -> Cycle:
    """Both lower steps written out with `create_graph`, and one backward pass through it all.

    The new weights are not written back, so that every cycle is the first one. In float64 this is
    the truth that everything is compared with.
    """
    graph: list[tuple[Weights, Weights]] = []

    def lower() -> None:
        graph.clear()
        weights, head = _weights(problem.autoencoder), _weights(problem.head)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            gradient = _gradient(problem.reconstruction_loss(problem.unlabeled), weights)
            new = adamw_step(weights, gradient, problem.autoencoder_optimizer)
            gradient = _gradient(_classification_loss(problem, new, head, problem.labeled), head)
            new_head = adamw_step(head, gradient, problem.head_optimizer)
        graph.append((new, new_head))

    def update() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = _classification_loss(problem, *graph.pop(), problem.held_out)
            loss.backward(inputs=list(problem.masking.parameters()))

    return Cycle(lower, update)


def identity_by_double_backward(problem: Problem) -> Cycle:
    """What Betty's "darts" approximates, exactly: inverse Hessians replaced by the identity.

    Everything but the scores is taken at the new weights. Serves in float64, to show that Betty is
    set up as it should be.
    """
    kept: list[Tensor] = []

    def lower() -> None:
        with torch.no_grad():
            out = problem.autoencoder(problem.unlabeled, scorer=problem.masking)
        kept[:] = [out["embedding"]]
        autoencoder_step(problem)
        head_step(problem)

    def update() -> None:
        weights, head, masking = (list(n.parameters()) for n in problem.networks.values())
        loss = problem.classification_loss(*problem.held_out)
        adjoint = _grad(loss, weights + head)
        loss = problem.classification_loss(*problem.labeled)
        through_head = _mixed(loss, head, adjoint[len(weights) :], weights)
        total = [a - t for a, t in zip(adjoint, through_head, strict=False)]
        with sdpa_kernel(SDPBackend.MATH):
            loss = problem.reconstruction_loss(problem.unlabeled, *kept)
            mixed = _mixed(loss, weights, total, masking)
        for parameter, product in zip(masking, mixed, strict=True):
            parameter.grad = -product

    return Cycle(lower, update)


CONTENDERS: dict[str, Contender] = {
    "betty": betty_darts,
    "double_backward": double_backward,
    "unrolled": library(Unrolled(steps=1)),
    "unrolled_micro_batches": library(Unrolled(steps=1), num_micro_batches=2),
    "unrolled_recomputing": library(Unrolled(steps=1), keep_activations=False),
    "unrolled_differences": library(FiniteDifference(Unrolled(steps=1), relative_step=1e-4)),
    "sama": library(Sama()),
    "identity": library(Identity()),
}
"""What is compared, in fp32."""

REFERENCES: dict[str, Contender] = {
    "truth": double_backward,
    "identity_truth": identity_by_double_backward,
}
"""What is compared with, in float64."""


def adamw_step(weights: Weights, gradient: Weights, optimizer: torch.optim.AdamW) -> Weights:
    """The weights after one step of `torch.optim.AdamW`, as a differentiable function of both."""
    names = {id(weight): name for name, weight in weights.items()}
    new = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name, state = names[id(parameter)], optimizer.state[parameter]
            new[name] = _adamw(parameter, gradient[name], state, group)
    return new


def _adamw(weight: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
    lr, (beta1, beta2), step = group["lr"], group["betas"], float(state["step"]) + 1
    first = beta1 * state["exp_avg"] + (1 - beta1) * gradient
    second = (beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()) / (1 - beta2**step)
    # Where no gradient ever came (the position of a patch that was always hidden), the square
    # root has no derivative, and none is wanted.
    root = torch.where(second > 0, second, 1.0).sqrt()
    change = first / (1 - beta1**step) / (root + group["eps"])
    return (1 - lr * group["weight_decay"]) * weight - lr * change


def _classification_loss(
    problem: Problem, weights: Weights, head: Weights, batch: tuple[Tensor, Tensor]
) -> Tensor:
    images, labels = batch
    features = functional_call(problem.autoencoder, weights, (images,))
    return F.cross_entropy(functional_call(problem.head, head, (features,)), labels)


def _weights(network: nn.Module) -> Weights:
    return dict(network.named_parameters())


def _gradient(loss: Tensor, weights: Weights) -> Weights:
    gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return dict(zip(weights, gradient, strict=True))


def _mixed(
    loss: Tensor, inner: list[Tensor], direction: list[Tensor], outer: list[Tensor]
) -> list[Tensor]:
    """Gradient by the outer weights of <dloss/dinner, direction>."""
    gradient = torch.autograd.grad(loss, inner, create_graph=True)
    return _grad(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)), outer)


def _grad(value: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, weights, materialize_grads=True))
