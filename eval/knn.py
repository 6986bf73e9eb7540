"""k-nearest-neighbour evaluation of a frozen encoder.

    python eval/knn.py --checkpoint RUN --train train.beton --test test.beton
    deepspeed eval/knn.py --recipe knn_mae_ct --checkpoint RUN --train T.beton --test V.beton

The k training images with the most similar features vote for the class of a test image. Several
processes share the encoding and the test images; the result is the same for any number of them.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.frozen import cli, flags
from eval.frozen.features import EncodedSets, ImageSets
from eval.frozen.preprocess import Standardizer
from mlomae.distributed.collectives import rank, sum_in_float64, world_size
from mlomae.errors import UserError

Weighting = Literal["exponential", "uniform"]

_PROTOCOL = """
Features of un-augmented images, L2-normalised (`standardize`: every dimension is first standardised
by mean and deviation of the training features). The k training images of the largest cosine
similarity s vote for the class of a test image with weight exp(s / temperature), or with equal ones
(`weighting` uniform). No setting was chosen on the test images. Published k-NN numbers do not say
whether features were standardised: compare with the same setting only.
"""


@dataclass(frozen=True)
class KnnSettings:
    """How neighbours vote; the defaults are those of MAE-CT."""

    k: int = 10
    """Neighbours that vote."""
    temperature: float = 0.07
    """Divides the cosine similarity: small values let the nearest decide."""
    weighting: Weighting = "exponential"
    """`uniform` gives each neighbour one vote, whatever the temperature."""
    standardize: bool = False
    """Standardise every dimension by the training features first."""


def knn_predict(
    bank: Iterable[Tensor],
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int = KnnSettings.k,
    temperature: float = KnnSettings.temperature,
    weighting: Weighting = KnnSettings.weighting,
    chunk_size: int = 4096,
) -> Tensor:
    """Class of each query by the weighted vote of its nearest training images.

    Features are L2-normalised; a neighbour of cosine similarity s votes with exp(s / temperature).

    Args:
        bank: features of the training images in parts [c, D], iterated once for each chunk of
            queries; a part is on the device of the queries, or is brought there by the iteration.
        bank_labels: int64 [n], of all parts.
        queries: [m, D].
        num_classes: Labels are in [0, num_classes).
        k: Neighbours that vote, at most n.
        temperature: Sharpness of the vote, positive.
        weighting: `uniform` lets all neighbours count alike.
        chunk_size: Queries compared at once: bounds the memory and does not change the result.

    Returns:
        Predicted classes, int64 [m]; among equal votes the first class.

    Raises:
        UserError: There are fewer than k training images.

    Source: Lehner et al., arXiv 2304.10520 (MAE-CT), after Wu et al., arXiv 1805.01978.
    """
    _check_k(k, len(bank_labels))
    labels = bank_labels.to(queries.device)
    predictions = []
    for chunk in torch.split(F.normalize(queries, dim=1), chunk_size):
        similarity, index = _nearest(chunk, bank, k)
        # Relative to the nearest, since exp(s / temperature) itself may overflow.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        if weighting == "uniform":
            weight = torch.ones_like(weight)
        vote = weight.new_zeros(len(chunk), num_classes)
        predictions.append(vote.scatter_add_(1, labels[index], weight).argmax(dim=1))
    return torch.cat(predictions) if predictions else labels[:0]


def _check_k(k: int, num_train_images: int) -> None:
    if not 1 <= k <= num_train_images:
        raise UserError(f"k is {k}, but must be from 1 to the {num_train_images} training images")


def _nearest(queries: Tensor, bank: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities [q, k] of queries [q, D] to the bank, and their rows."""
    best_similarity = queries.new_empty(len(queries), 0)
    best_index = torch.empty_like(best_similarity, dtype=torch.int64)
    start = 0
    for part in bank:
        similarity = queries @ F.normalize(part, dim=1).T
        similarity, index = similarity.topk(min(k, len(part)), dim=1)
        similarity = torch.cat([best_similarity, similarity], dim=1)
        index = torch.cat([best_index, start + index], dim=1)
        best_similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best_index = index.gather(1, order)
        start += len(part)
    return best_similarity, best_index


class _Bank:
    """Training features, brought to the device and standardised part by part at each iteration."""

    def __init__(self, data: EncodedSets, device: str | torch.device, standardize: bool) -> None:
        self.features, self.device = data.train.features, device
        self.transform: Callable[[Tensor], Tensor] = lambda x: x
        if standardize:
            self.transform = Standardizer.of(self.features, device)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.transform, self.features.parts(self.device))


def evaluate(
    data: EncodedSets, settings: KnnSettings, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Accuracy on the test images, in [0, 1], with the settings that gave it. All ranks must call.

    Each rank predicts its share of the test images.
    """
    bank = _Bank(data, device, settings.standardize)
    share = np.arange(rank(), len(data.test.labels), world_size())
    queries = bank.transform(data.test.features[share].load(device))
    how = asdict(settings)
    how.pop("standardize")
    predictions = knn_predict(bank, data.train.labels, queries, num_classes=data.num_classes, **how)
    correct = predictions.cpu() == data.test.labels[share]
    accuracy = float(sum_in_float64(correct.sum())) / len(data.test.labels)
    return {"accuracy": accuracy, "settings": asdict(settings)}


def _run(args: argparse.Namespace) -> None:
    settings = KnnSettings(args.k, args.temperature, args.weighting, args.standardize)
    sets = ImageSets(args.train, args.test, args.num_train_images)
    _check_k(settings.k, len(sets.train))

    def measure(evaluation: cli.Evaluation) -> dict[str, Any]:
        data = evaluation.encode(sets)
        return {**cli.describe(data), **evaluate(data, settings, evaluation.device)}

    cli.evaluate_encoder(args, "knn", measure, _PROTOCOL)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = flags.build_parser("eval/knn.py", __doc__)
    flags.add_features_argument(parser)
    flags.add_train_argument(parser)
    flags.add_num_train_argument(parser)
    default = KnnSettings()
    parser.add_argument("--k", type=flags.positive_int, default=default.k)
    parser.add_argument("--temperature", type=flags.positive_float, default=default.temperature)
    parser.add_argument(
        "--weighting", choices=("exponential", "uniform"), default=default.weighting
    )
    parser.add_argument(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        default=default.standardize,
        help="standardise features by mean and deviation of the training features",
    )
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())
