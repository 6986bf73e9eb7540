"""An independent float64 reference: differentiate explicitly unrolled optimizer steps.

Nothing here uses `mlomae.hypergrad`. The steps are written out, every gradient is taken with
`create_graph`, and autograd does the rest.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Weights = dict[str, Tensor]


@dataclass
class OptimizerState:
    """Settings of one optimizer and what it remembers, per parameter."""

    kind: str  # "sgd" or "adamw"
    lr: float
    weight_decay: float = 0.0
    decay_vectors: bool = True  # whether 1-D weights decay as well
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 0.0
    num_steps: int = 0
    memory: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


def of_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> OptimizerState:
    """The state of a torch optimizer with one parameter group, copied in float64."""
    group = optimizer.param_groups[0]
    kind = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw"
    state = OptimizerState(kind, group["lr"], group["weight_decay"])
    if kind == "sgd":
        state.momentum = group["momentum"]
    else:
        state.betas, state.eps = group["betas"], group["eps"]
    keys = ("momentum_buffer",) if kind == "sgd" else ("exp_avg", "exp_avg_sq")
    for name, param in module.named_parameters():
        entry = optimizer.state.get(param, {})
        if all(entry.get(key) is not None for key in keys):
            state.memory[name] = tuple(entry[key].detach().double().clone() for key in keys)
            state.num_steps = int(entry.get("step", 1))
    return state


def step(weights: Weights, loss: Tensor, state: OptimizerState) -> Weights:
    """One optimizer step as a differentiable function of the weights and of the loss's inputs."""
    grads = dict(zip(weights, _gradients(loss, weights), strict=True))
    if state.max_norm:
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        scale = torch.clamp(state.max_norm / (norm + 1e-6), max=1.0)
        grads = {name: grad * scale for name, grad in grads.items()}
    return {name: _step_one(name, w, grads[name], state) for name, w in weights.items()}


def _step_one(name: str, weight: Tensor, grad: Tensor, state: OptimizerState) -> Tensor:
    decay = state.weight_decay if state.decay_vectors or weight.ndim > 1 else 0.0
    if state.kind == "sgd":
        grad = grad + decay * weight
        if state.momentum and name in state.memory:
            grad = state.momentum * state.memory[name][0] + grad
        return weight - state.lr * grad
    beta1, beta2 = state.betas
    m, v = state.memory.get(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad.square()
    t = state.num_steps + 1
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    # Where v is zero its root has no derivative; such weights do not move anyway.
    root = torch.where(v_hat > 0, v_hat, torch.ones_like(v_hat)).sqrt() * (v_hat > 0)
    return weight * (1 - state.lr * decay) - state.lr * m_hat / (root + state.eps)


def _gradients(loss: Tensor, weights: Weights) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
    return [
        torch.zeros_like(w) if g is None else g
        for w, g in zip(weights.values(), grads, strict=True)
    ]


@dataclass
class BruteForceMloMae:
    """Everything one MLO-MAE cycle with k1 = k2 = 1 starts from, in float64."""

    mae: nn.Module
    classifier: nn.Module
    masking: nn.Module
    pretrain_state: OptimizerState
    classifier_state: OptimizerState
    pretrain_batches: list[Tensor]  # micro-batches of equal size
    classifier_batch: tuple[Tensor, Tensor]
    mask_batch: tuple[Tensor, Tensor]
    # What each micro-batch's patches were ordered by; rounding may order them otherwise here.
    selection: list[Tensor] | None = None
    coupled: bool = False  # the scores see the encoder's weights
    normalized: bool = False  # the loss is divided by the hidden patches' scores
    seed: int = 0  # of the paths that the encoder's step drops

    def hypergradient(self) -> Weights:
        """dF/dtheta of F = L3(E+, C+), by autograd through both steps."""
        weights = _leaves(self.mae)
        head = _leaves(self.classifier)
        theta = _leaves(self.masking)
        with sdpa_kernel(SDPBackend.MATH):
            selection = self.selection or [None] * len(self.pretrain_batches)
            pairs = zip(self.pretrain_batches, selection, strict=True)
            torch.manual_seed(self.seed)
            self.mae.train()
            loss = torch.stack([self._pretrain_loss(weights, theta, *p) for p in pairs]).mean()
            new_weights = step(weights, loss, self.pretrain_state)
            self.mae.eval()
            head_loss = self._classifier_loss(new_weights, head, *self.classifier_batch)
            new_head = step(head, head_loss, self.classifier_state)
            outer = self._classifier_loss(new_weights, new_head, *self.mask_batch)
            return dict(zip(theta, torch.autograd.grad(outer, list(theta.values())), strict=True))

    def _pretrain_loss(
        self, weights: Weights, theta: Weights, images: Tensor, selection: Tensor | None
    ) -> Tensor:
        seen: list[Tensor] = []

        def order_by(embedding: Tensor) -> Tensor:
            seen.append(embedding if self.coupled else embedding.detach())
            return self._score(theta, seen[0]) if selection is None else selection

        out = functional_call(self.mae, weights, (images, order_by), {"coupled": self.coupled})
        hidden_patches = out["mask"].bool()
        scores = self._score(theta, seen[0])
        total = (out["patch_loss"] * scores)[hidden_patches].sum()
        return total / (scores[hidden_patches].sum() if self.normalized else hidden_patches.sum())

    def _score(self, theta: Weights, embedding: Tensor) -> Tensor:
        if "fc1.weight" not in theta:
            return functional_call(self.masking.double(), theta, (embedding,))
        # The network rounds its scores to float32; the reference does not.
        hidden = torch.relu(embedding.flatten(1) @ theta["fc1.weight"].T + theta["fc1.bias"])
        return torch.sigmoid(hidden @ theta["fc2.weight"].T + theta["fc2.bias"])

    def _classifier_loss(
        self, weights: Weights, head: Weights, images: Tensor, labels: Tensor
    ) -> Tensor:
        features = functional_call(self.mae, weights, (images,))
        return F.cross_entropy(functional_call(self.classifier, head, (features,)), labels)


def _leaves(module: nn.Module) -> Weights:
    return {n: p.detach().double().clone().requires_grad_() for n, p in module.named_parameters()}


def relative_error(value: Weights, reference: Weights) -> float:
    """2-norm of the difference over all tensors, relative to the reference."""
    difference = sum((value[n].double() - r).square().sum() for n, r in reference.items())
    return float((difference / sum(r.square().sum() for r in reference.values())).sqrt())


def cosine(value: Weights, reference: Weights) -> float:
    """Cosine between two gradients over all tensors."""
    inner = sum((value[n].double() * r).sum() for n, r in reference.items())
    norms = [sum(t[n].double().square().sum() for n in reference) for t in (value, reference)]
    return float(inner / (norms[0] * norms[1]).sqrt())
