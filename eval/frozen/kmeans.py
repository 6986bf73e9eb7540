"""k-means of many features: Lloyd's iterations from k-means++ starts, in chunks, with a seed.

Not scikit-learn's, which runs on the CPU alone, and whose sums depend on the number of threads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8192  # images whose distances to all centres are held at once


@dataclass(frozen=True)
class Clustering:
    """One restart.

    Attributes:
        clusters: int64 [n], on the features' device.
        inertia: sum of the squared distances of images to the centres of their clusters.
    """

    clusters: Tensor
    inertia: float


def kmeans(
    features: Tensor, num_clusters: int, *, seed: int, max_iterations: int = 300
) -> Clustering:
    """Partition rows into clusters of small variance.

    A cluster that loses all its images takes the image that is farthest from its centre.

    Args:
        features: float32 [n, D], n at least `num_clusters`.
        num_clusters: k.
        seed: of the starts.
        max_iterations: of Lloyd's; fewer when no image changes its cluster.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    centres = _start(features, num_clusters, torch.Generator().manual_seed(seed))
    clusters = features.new_full((len(features),), -1, dtype=torch.int64)
    for _ in range(max_iterations):
        before = clusters
        clusters, distances = _assign(features, centres)
        if torch.equal(clusters, before):
            break
        centres = _centres(features, clusters, distances, num_clusters)
    return Clustering(clusters, distances.double().sum().item())


def _start(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centre is an image, drawn by its squared distance to the nearest so far."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = features.new_full((len(features),), float("inf"))
    for _ in range(1, num_clusters):
        distance = (features - features[chosen[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, distance)
        total = nearest.double().cumsum(dim=0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).item() * total[-1]
        chosen.append(min(int(torch.searchsorted(total, draw, right=True)), len(features) - 1))
    return features[chosen]


def _assign(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row [n], and the squared distance to it [n]."""
    half_norms = centres.square().sum(dim=1) / 2
    clusters, distances = [], []
    for rows in torch.split(features, _ROWS):
        cluster = (rows @ centres.T - half_norms).argmax(dim=1)
        clusters.append(cluster)
        distances.append((rows - centres[cluster]).square().sum(dim=1))
    return torch.cat(clusters), torch.cat(distances)


def _centres(features: Tensor, clusters: Tensor, distances: Tensor, num_clusters: int) -> Tensor:
    """The mean of each cluster [k, D]; empty ones are at the farthest images."""
    counts = torch.bincount(clusters, minlength=num_clusters)
    sums = features.new_zeros(num_clusters, features.shape[1]).index_add_(0, clusters, features)
    centres = sums / counts.clamp(min=1)[:, None]
    empty = torch.nonzero(counts == 0)[:, 0]
    centres[empty] = features[distances.topk(len(empty)).indices]
    return centres
