"""The queue of earlier projections, among which neighbours are looked up."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mlomae.distributed.collectives import gather_over_ranks, rank, world_size
from mlomae.randomness import derive_seed


class Queue:
    """Unit vectors with class labels and sample ids, first in, first out.

    It starts with random vectors, whose labels and ids are -1. The vectors lie whole on every rank,
    or each rank has an equal part; labels and ids are whole on every rank in either case.

    Args:
        size: vectors, Q; every number of vectors pushed at once divides it, and so do the ranks.
        dim: width of a vector.
        sharded: each rank holds Q / world_size vectors.

    Attributes:
        labels, ids: int64 [Q].
        pointer: where the next vectors are written.
    """

    def __init__(
        self, size: int, dim: int, *, seed: int, device: torch.device, sharded: bool = False
    ) -> None:
        self.size, self.device = size, device
        self._layout_is_sharded = sharded
        self._is_sharded = sharded and world_size() > 1
        generator = torch.Generator().manual_seed(derive_seed(seed, size, dim))
        start = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self._vectors = self._shard(start).to(device, copy=True)
        self.labels = torch.full((size,), -1, device=device)
        self.ids = torch.full((size,), -1, device=device)
        self.pointer = 0

    @property
    def _first(self) -> int:
        """The number of this rank's first vector."""
        return rank() * (self.size // world_size()) if self._is_sharded else 0

    def _shard(self, whole: Tensor) -> Tensor:
        """This rank's part of something that has an entry for each vector."""
        return whole.chunk(world_size())[rank()] if self._is_sharded else whole

    def nearest(self, queries: Tensor, ids: Tensor, k: int) -> Tensor:
        """Numbers of the k most similar vectors, the most similar first.

        Vectors of the query's sample count as opposite to it. All ranks must call, with as many
        queries.

        Args:
            queries: unit vectors [n, dim].
            ids: of their samples, [n].

        Returns:
            int64 [n, k].
        """
        if not self._is_sharded:
            return self._nearest_here(queries, ids, k)[1]
        similarity, index = self._nearest_here(
            gather_over_ranks(queries), gather_over_ranks(ids), min(k, len(self._vectors))
        )
        similarity, index = (_by_query(part) for part in (similarity, index))
        best = similarity.topk(k, dim=1).indices
        return index.gather(1, best)

    def _nearest_here(self, queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarities and numbers [n, k] of the best among this rank's vectors."""
        similarity = queries @ self._vectors.T
        similarity.masked_fill_(ids[:, None] == self._shard(self.ids), -1.0)
        similarity, index = similarity.topk(k, dim=1)
        return similarity, index + self._first

    def take(self, index: Tensor) -> Tensor:
        """The vectors of these numbers, [n] -> [n, dim]. All ranks must call, with as many."""
        if not self._is_sharded:
            return self._vectors[index]
        wanted = gather_over_ranks(index) - self._first
        is_here = (wanted >= 0) & (wanted < len(self._vectors))
        vectors = self._vectors[wanted.clamp(0, len(self._vectors) - 1)] * is_here[:, None]
        dist.all_reduce(vectors)  # all but one rank add zeros, so this sum is exact
        return vectors.chunk(world_size())[rank()]

    def push(self, vectors: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Write the batches of all ranks over the oldest entries. All ranks must call.

        Args:
            vectors: unit vectors of this rank, [n, dim].
            labels, ids: int64 [n].
        """
        vectors, labels, ids = (gather_over_ranks(part) for part in (vectors, labels, ids))
        place = torch.arange(self.pointer, self.pointer + len(ids), device=self.device) % self.size
        self.labels[place], self.ids[place] = labels, ids
        place = place - self._first
        is_here = (place >= 0) & (place < len(self._vectors))
        self._vectors[place[is_here]] = vectors[is_here].to(self._vectors.dtype)
        self.pointer = (self.pointer + len(ids)) % self.size

    def state_dict(self) -> dict[str, Tensor]:
        """The whole queue under the names of the published head files. All ranks must call."""
        vectors = gather_over_ranks(self._vectors) if self._is_sharded else self._vectors
        return {
            "queue": vectors.cpu().clone(),
            "queue_y": self.labels.cpu().clone(),
            "queue_id": self.ids.cpu().clone(),
            "queue_ptr": torch.tensor([self.pointer]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with what `state_dict` gave, on any number of ranks, or with a published one."""
        self._vectors.copy_(self._shard(state["queue"]))
        self.labels.copy_(state["queue_y"])
        self.ids.copy_(state["queue_id"])
        self.pointer = int(state["queue_ptr"])

    def shared_state(self) -> dict[str, Tensor]:
        """What all ranks have alike."""
        state = {"queue_y": self.labels, "queue_id": self.ids}
        state["queue_ptr"] = torch.tensor([self.pointer])
        return state if self._layout_is_sharded else {"queue": self._vectors, **state}

    def rank_state(self) -> dict[str, Tensor]:
        """What this rank alone has."""
        return {"queue": self._vectors} if self._layout_is_sharded else {}

    def load_state(self, shared: Mapping[str, Tensor], of_rank: Mapping[str, Tensor]) -> None:
        """Take back what `shared_state` and `rank_state` gave."""
        self._vectors.copy_((of_rank if self._layout_is_sharded else shared)["queue"])
        self.labels.copy_(shared["queue_y"])
        self.ids.copy_(shared["queue_id"])
        self.pointer = int(shared["queue_ptr"])


def _by_query(part: Tensor) -> Tensor:
    """This rank's results for all queries, [R n, k] -> all ranks' for its queries, [n, R k]."""
    ranks = gather_over_ranks(part[None]).chunk(world_size(), dim=1)[rank()]  # [R, n, k]
    return ranks.transpose(0, 1).flatten(1)
