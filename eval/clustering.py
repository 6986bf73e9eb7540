"""Clustering of a frozen encoder's features by k-means, compared with the classes.

    python eval/clustering.py --checkpoint RUN --test images.beton
    deepspeed eval/clustering.py --recipe clustering_imagenet_dogs15 --checkpoint RUN --test V.beton

Labels are used to count, never to cluster or to choose. Several processes share the encoding and
the restarts; the result is the same for any number of them.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix

from eval.frozen import cli, flags
from eval.frozen.features import ImageSet, LabelledFeatures, class_labels
from eval.frozen.kmeans import kmeans
from eval.frozen.preprocess import Standardizer
from eval.frozen.processes import tracked
from mlomae.distributed.collectives import rank, sum_in_float64, world_size
from mlomae.errors import UserError

METRICS = ("accuracy", "nmi", "ami", "ari")
_DOGS15 = (
    "n02085936", "n02086646", "n02088238", "n02091467", "n02097130",
    "n02099601", "n02101388", "n02101556", "n02102177", "n02105056",
    "n02105412", "n02105855", "n02107142", "n02110958", "n02112137",
)  # fmt: skip
CLASS_LISTS = {"dogs15": _DOGS15}
"""Published parts of ImageNet by WordNet id: ImageNet-Dogs-15."""

_PROTOCOL = """
k-means (k-means++ starts, Lloyd's iterations) on features of un-augmented images, with as many
clusters as classes unless `num_clusters` says otherwise. `accuracy` is that of the best one-to-one
matching of clusters and classes; NMI and AMI are normalised by the arithmetic mean of entropies.
`_best` is the restart of the lowest inertia, which needs no label; `_mean` is over all restarts.
The published clusterings of MAE-CT do not tell their algorithm, restarts or preprocessing.
"""


@dataclass(frozen=True)
class ClusteringSettings:
    """How k-means runs."""

    num_clusters: int | None = None
    """None for the number of classes."""
    num_restarts: int = 10
    """Runs of k-means from different starts."""
    max_iterations: int = 300
    """Of Lloyd's in a restart, at most."""
    normalize: bool = True
    """L2-normalise each feature vector."""
    standardize: bool = False
    """Standardise every dimension over these images first."""
    seed: int = 0
    """Of the first restart; the next ones have the next seeds."""


def agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well clusters and classes, both int64 [n], agree.

    Returns:
        `accuracy` after the best one-to-one matching of clusters to classes; `nmi` and `ami`
        normalised by arithmetic means; `ari`.
    """
    table = contingency_matrix(labels, clusters)
    matching = linear_sum_assignment(table, maximize=True)
    return {
        "accuracy": float(table[matching].sum() / len(labels)),
        "nmi": normalized_mutual_info_score(labels, clusters),
        "ami": adjusted_mutual_info_score(labels, clusters),
        "ari": adjusted_rand_score(labels, clusters),
    }


def evaluate(
    data: LabelledFeatures, settings: ClusteringSettings, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The metrics of the best restart and their means. All ranks must call; each runs its share."""
    labels = data.labels.numpy()
    num_clusters = settings.num_clusters or len(np.unique(labels))
    features = data.features.load(device)
    if settings.standardize:
        features = Standardizer.of(data.features, device)(features)
    if settings.normalize:
        features = F.normalize(features, dim=1)
    table = torch.zeros(settings.num_restarts, 1 + len(METRICS), dtype=torch.float64)
    for i in tracked(range(rank(), settings.num_restarts, world_size()), "restarts"):
        seed, limit = settings.seed + i, settings.max_iterations
        clustering = kmeans(features, num_clusters, seed=seed, max_iterations=limit)
        scores = agreement(clustering.clusters.cpu().numpy(), labels)
        numbers = [clustering.inertia, *(scores[name] for name in METRICS)]
        table[i] = torch.tensor(numbers, dtype=torch.float64)
    table = sum_in_float64(table)
    best, mean = table[table[:, 0].argmin()].tolist(), table.mean(dim=0).tolist()
    columns = list(enumerate(METRICS, start=1))
    return {
        **{f"{name}_best": best[column] for column, name in columns},
        **{f"{name}_mean": mean[column] for column, name in columns},
        "restarts": [dict(zip(("inertia", *METRICS), r, strict=True)) for r in table.tolist()],
        "num_clusters": num_clusters,
        "settings": asdict(settings),
    }


def read_classes(source: str) -> tuple[str, ...]:
    """The class names of a file, one a line, or of a published list by its name.

    Raises:
        UserError: it is neither.
    """
    if source in CLASS_LISTS:
        return CLASS_LISTS[source]
    try:
        names = [line.split() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        known = " or ".join(CLASS_LISTS)
        raise UserError(
            f"--classes {source} cannot be read ({error}): give a text file, or {known}"
        ) from None
    return tuple(line[0] for line in names if line)


def restrict(images: ImageSet, classes: tuple[str, ...], source: str) -> None:
    """Keep the images of some classes.

    Raises:
        UserError: a class is not there.
    """
    info = images.info
    if unknown := [name for name in classes if name not in info.classes]:
        raise UserError(f"--classes {source} has {unknown[0]}, which is no class of {info.path}")
    wanted = [info.classes.index(name) for name in classes]
    images.indices = np.flatnonzero(np.isin(class_labels(info, str(info.path)), wanted))


def _run(args: argparse.Namespace) -> None:
    settings = ClusteringSettings(
        args.num_clusters,
        args.num_restarts,
        args.max_iterations,
        args.normalize,
        args.standardize,
        args.seed,
    )
    images = ImageSet(args.test)
    if args.classes is not None:
        restrict(images, read_classes(args.classes), args.classes)
    num_classes = len(np.unique(images.labels))
    num_clusters = settings.num_clusters or num_classes
    if num_clusters < 2:
        raise UserError(
            f"{args.test} would become {num_clusters} clusters, and it takes 2 or more to compare: "
            "change --num_clusters or --classes"
        )
    if len(images) < num_clusters:
        raise UserError(
            f"{args.test} has {len(images)} images of these classes, too few for {num_clusters} "
            "clusters: lower --num_clusters, or change --classes"
        )

    def measure(evaluation: cli.Evaluation) -> dict[str, Any]:
        features = images.encode(evaluation.encoder, evaluation.features, evaluation.device)
        measured = evaluate(features, settings, evaluation.device)
        return {"num_test_images": len(images), "num_classes": num_classes, **measured}

    cli.evaluate_encoder(args, "clustering", measure, _PROTOCOL)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = flags.build_parser("eval/clustering.py", __doc__)
    flags.add_features_argument(parser)
    default = ClusteringSettings()
    parser.add_argument(
        "--classes",
        metavar="FILE",
        help=f"a file of class names, one a line, or {' or '.join(CLASS_LISTS)} (default: all)",
    )
    parser.add_argument("--num_clusters", type=flags.positive_int, help="default: of the classes")
    parser.add_argument("--num_restarts", type=flags.positive_int, default=default.num_restarts)
    parser.add_argument("--max_iterations", type=flags.positive_int, default=default.max_iterations)
    for flag, what in (("normalize", "L2-normalise features"), ("standardize", "standardise them")):
        parser.add_argument(
            f"--{flag}",
            action=argparse.BooleanOptionalAction,
            default=getattr(default, flag),
            help=what,
        )
    parser.add_argument("--seed", type=flags.non_negative_int, default=default.seed)
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())
