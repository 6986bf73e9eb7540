"""k-nearest-neighbour evaluation of a frozen encoder.

    python eval/knn.py --checkpoint RUN --train train.beton --test test.beton

The k training images with the most similar features vote for the class of a test image.
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import cli
from eval.features import EncodedSets
from mlomae.errors import UserError


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours vote; the defaults are those of MAE-CT."""

    k: int = 10
    """Neighbours that vote."""
    temperature: float = 0.07
    """Divides the cosine similarity: small values let the nearest decide."""


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    k: int = KnnSettings.k,
    temperature: float = KnnSettings.temperature,
    chunk_size: int = 4096,
) -> Tensor:
    """Class of each test image by the weighted vote of its nearest training images.

    Features are L2-normalised; a neighbour of cosine similarity s votes with exp(s / temperature).

    Args:
        train_features: [n, D].
        train_labels: int64 [n].
        test_features: [m, D], on the same device.
        num_classes: Labels are in [0, num_classes).
        k: Neighbours that vote, at most n.
        temperature: Sharpness of the vote, positive.
        chunk_size: Images of either side compared at once: bounds the memory at its square and
            does not change the result.

    Returns:
        Predicted classes, int64 [m].

    Raises:
        UserError: There are fewer than k training images.

    Source: Lehner et al., arXiv 2304.10520 (MAE-CT), after Wu et al., arXiv 1805.01978.
    """
    if not 1 <= k <= len(train_features):
        raise UserError(
            f"k is {k}, but must be from 1 to the {len(train_features)} training images"
        )
    bank = F.normalize(train_features, dim=1)
    votes = []
    for queries in F.normalize(test_features, dim=1).split(chunk_size):
        similarity, index = _nearest(queries, bank, k, chunk_size)
        # Relative to the nearest, since exp(s / temperature) itself may overflow.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        vote = weight.new_zeros(len(queries), num_classes)
        votes.append(vote.scatter_add_(1, train_labels[index], weight).argmax(dim=1))
    return torch.cat(votes)


def _nearest(queries: Tensor, bank: Tensor, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities [q, k] of queries [q, D] to bank [n, D], and their rows."""
    best_similarity = queries.new_empty(len(queries), 0)
    best_index = torch.empty_like(best_similarity, dtype=torch.int64)
    for start in range(0, len(bank), chunk_size):
        chunk = queries @ bank[start : start + chunk_size].T
        similarity, index = chunk.topk(min(k, chunk.shape[1]), dim=1)
        similarity = torch.cat([best_similarity, similarity], dim=1)
        index = torch.cat([best_index, start + index], dim=1)
        best_similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best_index = index.gather(1, order)
    return best_similarity, best_index


def evaluate(data: EncodedSets, settings: KnnSettings) -> dict[str, Any]:
    """Accuracy on the test images, in [0, 1], with the settings that gave it."""
    predictions = knn_predict(
        *data.train, data.test.features, num_classes=data.num_classes, **asdict(settings)
    )
    accuracy = (predictions == data.test.labels).double().mean().item()
    return {"accuracy": accuracy, "settings": asdict(settings)}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = cli.build_parser("eval/knn.py", __doc__)
    parser.add_argument("--k", type=cli.positive_int, default=KnnSettings.k)
    parser.add_argument("--temperature", type=cli.positive_float, default=KnnSettings.temperature)
    args = parser.parse_args(argv)
    settings = KnnSettings(args.k, args.temperature)
    return cli.run(lambda: cli.evaluate_encoder(args, "knn", lambda data: evaluate(data, settings)))


if __name__ == "__main__":
    sys.exit(main())
