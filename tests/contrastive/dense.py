"""The loss of MAE-CT written down once more: float64, one process, plain loops."""

import math
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5


def loss(case: dict[str, Any], draws: Tensor) -> dict[str, Any]:
    """The loss of a whole batch with its gradients.

    Args:
        case: arguments of `rank_cases._loss`.
        draws: which of its neighbours each sample of each view takes, [2, N].
    """
    head = {
        name: t.double().requires_grad_(name.endswith(("weight", "bias")))
        for name, t in case["head"].items()
    }
    features = case["features"].double().requires_grad_()
    projections = [projector(view, head, "projector.") for view in features]
    predictions = [unit(predictor(view, head)) for view in projections]
    with torch.no_grad():
        if case["target"] is not None:
            target = {name: t.double() for name, t in case["target"].items()}
            projections = [projector(view, target, "") for view in features]
        z = [unit(view) for view in projections]
        neighbours, hits = [], 0
        for view in (0, 1):
            rows = []
            for i in range(len(z[view])):
                order = ranking(z[view][i], int(case["ids"][i]), case["queue"])
                rows.append(case["queue"]["queue"][order[int(draws[view][i])]].double())
                hits += int(case["queue"]["queue_y"][order[0]] == case["labels"][i])
            neighbours.append(rows)
    terms = []
    for a, b in ((0, 1), (1, 0)):
        for i, neighbour in enumerate(neighbours[b]):
            logits = [neighbour @ q / case["temperature"] for q in predictions[a]]
            terms.append(torch.stack(logits).logsumexp(dim=0) - logits[i])
    total = sum(terms) / len(terms)
    total.backward()
    return {
        "loss": float(total.detach()),
        "features": features.grad,
        "weights": {n: t.grad for n, t in head.items() if t.grad is not None},
        "accuracy": hits / len(terms),
        "targets": torch.stack(z),
    }


def ranking(query: Tensor, own_id: int, queue: dict[str, Tensor]) -> list[int]:
    """Entries of the queue, the most similar first; those of the own sample count as -1."""
    similarities = []
    for number, vector in enumerate(queue["queue"]):
        is_own = int(queue["queue_id"][number]) == own_id
        products = [float(x) * float(y) for x, y in zip(query, vector, strict=True)]
        similarities.append(-1.0 if is_own else math.fsum(products))
    return sorted(range(len(similarities)), key=lambda number: -similarities[number])


def projector(x: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    for linear, norm in ((0, 1), (3, 4), (6, 7)):
        x = x @ weights[f"{prefix}{linear}.weight"].T
        x = normed(x, weights[f"{prefix}{norm}.weight"], weights[f"{prefix}{norm}.bias"])
        x = x if norm == 7 else x.clamp(min=0)
    return x


def predictor(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    x = x @ weights["predictor.0.weight"].T
    x = normed(x, weights["predictor.1.weight"], weights["predictor.1.bias"]).clamp(min=0)
    return x @ weights["predictor.3.weight"].T


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of the whole batch [N, C]."""
    mean = x.sum(dim=0) / len(x)
    variance = ((x - mean) ** 2).sum(dim=0) / len(x)
    return (x - mean) / (variance + EPS) ** 0.5 * weight + bias


def unit(rows: Tensor) -> Tensor:
    return rows / (rows**2).sum(dim=1, keepdim=True) ** 0.5


def running_statistics(batches: list[Tensor], momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a batch norm that has seen these inputs [N, C]."""
    mean, variance = torch.zeros(batches[0].shape[1]), torch.ones(batches[0].shape[1])
    for batch in batches:
        mean = (1 - momentum) * mean + momentum * batch.mean(dim=0)
        variance = (1 - momentum) * variance + momentum * batch.var(dim=0, unbiased=True)
    return mean, variance
