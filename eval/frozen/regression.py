"""Multinomial logistic regression with an L2 penalty and no intercept, with a certified gap."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 16_384  # images whose logits are held at once
_ITERATIONS = 20  # of L-BFGS between two looks at the gap
_HISTORY = 10


@dataclass(frozen=True)
class Regression:
    """A fitted model.

    Attributes:
        weight: float64 [num_classes, D]; the logits of features x are weight @ x.
        num_passes: passes over the images.
        gap: the objective exceeds its minimum by at most this share of itself.
    """

    weight: Tensor
    num_passes: int
    gap: float

    def predict(self, features: Tensor) -> Tensor:
        """Class of each row, int64 [n], from features [n, D]."""
        return (features.double() @ self.weight.T).argmax(dim=1)


class _Objective:
    """f(W) = mean cross-entropy of the logits X W^T + penalty / 2 |W|^2, by its values at one W."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> None:
        self.features, self.labels, self.penalty = features, labels, penalty
        self.weight = features.new_zeros(num_classes, features.shape[1]).requires_grad_()
        self.num_passes, self.value, self.gap = 0, float("inf"), float("inf")

    @torch.no_grad()
    def __call__(self) -> float:
        """The objective, with its gradient in `weight.grad` and its relative duality gap.

        With p the predicted probabilities and G the gradient of the mean cross-entropy, the dual
        point p - y has the value mean entropy(p) - |G|^2 / (2 penalty), which no W falls below
        (Fenchel duality; it equals f where G = -penalty W, at the minimum).
        """
        loss = entropy = 0.0
        slope = torch.zeros_like(self.weight)
        for rows, labels in self._parts():
            log_p = F.log_softmax(rows @ self.weight.T, dim=1)
            loss += float(F.nll_loss(log_p, labels, reduction="sum"))
            p = log_p.exp()
            entropy -= float((p * log_p).sum())
            p[torch.arange(len(rows), device=p.device), labels] -= 1
            slope += p.T @ rows
        n = len(self.labels)
        slope /= n
        self.num_passes += 1
        self.value = loss / n + self.penalty / 2 * float(self.weight.square().sum())
        dual = entropy / n - float(slope.square().sum()) / (2 * self.penalty)
        self.gap = (self.value - dual) / self.value if self.value > 0 else 0.0
        self.weight.grad = slope + self.penalty * self.weight
        return self.value

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = (torch.split(tensor, _ROWS) for tensor in (self.features, self.labels))
        yield from zip(*parts, strict=True)


def fit_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalty: float,
    max_passes: int = 300,
    tolerance: float = 1e-3,
) -> Regression:
    """Minimise mean cross-entropy + penalty / 2 |W|^2 by L-BFGS, in float64.

    Scikit-learn's `LogisticRegression(C=1 / (n penalty), fit_intercept=False)` is the same problem.

    Args:
        features: [n, D].
        labels: int64 [n], in [0, num_classes).
        num_classes: rows of the weight.
        penalty: of the squared weights, above zero.
        max_passes: evaluations of the objective, about.
        tolerance: stop once the objective is proven to be within this share of its minimum.
    """
    objective = _Objective(features.double(), labels, num_classes, penalty)
    optimizer = torch.optim.LBFGS(
        [objective.weight],
        max_iter=_ITERATIONS,
        history_size=_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    objective()
    while objective.gap > tolerance and objective.num_passes < max_passes:
        optimizer.param_groups[0]["max_eval"] = min(
            2 * _ITERATIONS, max_passes - objective.num_passes
        )
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()
    return Regression(objective.weight.detach(), objective.num_passes, objective.gap)
