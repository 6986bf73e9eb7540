"""What several ranks compute, to be compared with one process that sees the whole batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.contrastive.loss import NnclrLoss, TwoViews
from mlomae.contrastive.queue import Queue
from mlomae.contrastive.target import TargetProjector
from mlomae.models.contrastive import NnclrHead

SIZES = {
    "embed_dim": 6,
    "projector_hidden_dim": 10,
    "projection_dim": 4,
    "predictor_hidden_dim": 12,
}


def mine(whole: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of a global batch."""
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def losses_and_queues(cases: list[dict[str, Any]], queue_case: dict[str, Any]) -> Any:
    """What `_loss` finds in each case, and `_queues` in its one."""
    return [_loss(**case) for case in cases], _queues(**queue_case)


def _loss(
    head: dict[str, Tensor],
    target: dict[str, Tensor] | None,
    features: Tensor,
    labels: Tensor,
    ids: Tensor,
    queue: dict[str, Tensor],
    step: int,
    temperature: float,
    top_k: int,
    sharded: bool,
) -> dict[str, Any]:
    """Loss, gradients averaged over ranks, and what happens to the queue."""
    module = NnclrHead(**SIZES)
    module.load_state_dict(head)
    own = Queue(len(queue["queue"]), 4, seed=0, device=torch.device("cpu"), sharded=sharded)
    own.load_state_dict(queue)
    loss = NnclrLoss("head", own, temperature, top_k, seed=7)
    if target is not None:
        loss.target = TargetProjector(module.projector, 0.9, own.device, torch.float32)
        loss.target.load_state_dict(target)
    inputs = mine(features, 1).clone().requires_grad_()
    batch = TwoViews(inputs, mine(labels), mine(ids), step)
    value = loss({"head": module}, batch)
    value.backward()
    own.push(loss.targets[0], batch.labels, batch.ids)
    return {
        "loss": value.detach(),
        "features": inputs.grad,
        "weights": {name: _mean(p.grad) for name, p in module.named_parameters()},
        "head": module.state_dict(),
        "draws": loss._draw(batch),
        "accuracy": loss.accuracy,
        "targets": loss.targets,
        "queue": own.state_dict(),
    }


def _mean(grad: Tensor) -> Tensor:
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def _queues(size: int, pushes: list[dict[str, Tensor]], probes: Tensor) -> dict[str, Any]:
    """The same vectors through a whole queue and through one in parts, probed after each push."""
    kinds = {
        name: Queue(size, pushes[0]["vectors"].shape[1], seed=3, device=torch.device("cpu"),
                    sharded=name == "sharded")
        for name in ("replicated", "sharded")
    }  # fmt: skip
    found: dict[str, Any] = {name: [queue.state_dict()] for name, queue in kinds.items()}
    for push in pushes:
        for name, queue in kinds.items():
            queue.push(*(mine(push[key]) for key in ("vectors", "labels", "ids")))
            nearest = queue.nearest(mine(probes), mine(push["ids"]), 5)
            taken = queue.take(nearest[:, 1])
            found[name].append({**queue.state_dict(), "nearest": nearest, "taken": taken})
    for name, queue in kinds.items():
        fresh = Queue(size, probes.shape[1], seed=4, device=queue.device, sharded=name == "sharded")
        fresh.load_state(queue.shared_state(), queue.rank_state())
        found[name].append(fresh.state_dict())
    return found
