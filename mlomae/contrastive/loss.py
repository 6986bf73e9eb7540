"""The NNCLR loss: a sample's neighbour has to be recognised among the predictions of a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlomae.contrastive.queue import Queue
from mlomae.distributed.collectives import gather_over_ranks, rank, world_size
from mlomae.hypergrad.losses import Models
from mlomae.models.contrastive import Embedded
from mlomae.models.precision import at_least_float32
from mlomae.randomness import derive_seed


class TwoViews(NamedTuple):
    """A batch of this rank."""

    inputs: Tensor  # [2, B, ...]: what the level's module takes of both views
    labels: Tensor  # int64 [B], for the accuracy alone
    ids: Tensor  # int64 [B], of the samples
    step: int  # which the draw of neighbours depends on


@dataclass
class NnclrLoss:
    """Both directions of the loss of one level, on the batch of all ranks.

    With unit projections z, neighbours nn(z) of a queue and unit predictions q of the views a and
    b, direction a to b is the cross-entropy of the logits <nn(z_i^b), q_j^a> / temperature over j,
    the batch of all ranks; the right j is i. Gradients flow through q alone.

    Args:
        name: of the level.
        top_k: a neighbour is drawn uniformly among so many; 1 takes the nearest.
        seed: of the draw.
        target: makes z of the features; None for the level's projector.

    Attributes:
        targets: z [2, B, dim] of the latest batch.
        accuracy: how often the nearest queue entry had the label, in the latest batch.

    Source: Lehner et al., arXiv 2304.10520; Dwibedi et al., arXiv 2104.14548.
    """

    name: str
    queue: Queue
    temperature: float
    top_k: int = 1
    seed: int = 0
    target: Callable[[Tensor], Tensor] | None = None
    targets: Tensor = field(init=False)
    accuracy: Tensor = field(init=False)

    def __call__(self, models: Models, batch: TwoViews) -> Tensor:
        """The scalar loss of this rank's rows. All ranks must call."""
        embedded: Embedded = models[self.name](batch.inputs)
        self.targets = self._targets(embedded)
        neighbours = self._neighbours(batch)
        predictions = F.normalize(at_least_float32(embedded["predictions"]), dim=-1)
        columns = gather_over_ranks(predictions.transpose(0, 1)).unbind(dim=1)
        count = len(batch.ids)
        answers = torch.arange(rank() * count, (rank() + 1) * count, device=predictions.device)
        losses = [
            F.cross_entropy(neighbours[1 - view] @ columns[view].T / self.temperature, answers)
            for view in (0, 1)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _targets(self, embedded: Embedded) -> Tensor:
        projections = embedded["projections"]
        if self.target is not None:
            projections = torch.stack([self.target(view) for view in embedded["features"]])
        return F.normalize(at_least_float32(projections), dim=-1)

    @torch.no_grad()
    def _neighbours(self, batch: TwoViews) -> Tensor:
        """nn(z), [2, B, dim]; the accuracy is noted on the way."""
        index = self.queue.nearest(self.targets.flatten(0, 1), batch.ids.repeat(2), self.top_k)
        hits = self.queue.labels[index[:, 0]] == batch.labels.repeat(2)
        self.accuracy = hits.float().mean()
        chosen = index.gather(1, self._draw(batch)[:, None])[:, 0]
        return torch.unflatten(self.queue.take(chosen), 0, (2, -1))

    def _draw(self, batch: TwoViews) -> Tensor:
        """Which of a sample's neighbours, [2 B]: a function of seed, step and place in the batch.

        The numbers of all ranks are drawn, so that they depend neither on the number of ranks nor
        on a resume.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, batch.step))
        drawn = torch.randint(self.top_k, (2, world_size(), len(batch.ids)), generator=generator)
        return drawn[:, rank()].flatten().to(batch.ids.device)
