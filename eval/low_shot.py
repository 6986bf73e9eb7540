"""Low-shot evaluation of a frozen encoder: logistic regression on a few images per class.

    python eval/low_shot.py --checkpoint RUN --train train.beton --test test.beton
    deepspeed eval/low_shot.py --recipe low_shot_msn --checkpoint RUN --train T.beton --test V.beton
    python eval/low_shot.py --checkpoint RUN --train imagenet/train --test V.beton \\
        --split_list 5imgs_class_1.txt 5imgs_class_2.txt 5imgs_class_3.txt

Only the images of the splits and the test images are encoded. Several processes share the encoding
and the splits; the result is the same for any number of them.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.frozen import cli, flags
from eval.frozen.features import EncodedSets, ImageSets, LabelledFeatures
from eval.frozen.preprocess import centre_rows
from eval.frozen.processes import tracked
from eval.frozen.regression import fit_regression
from eval.frozen.splits import draw_fraction, draw_per_class, read_lists
from mlomae.distributed.collectives import rank, sum_in_float64, world_size
from mlomae.errors import UserError

_PROTOCOL = """
Every feature vector, of training and test images alike, is centred by its own mean and
L2-normalised. Multinomial logistic regression without intercept minimises the mean cross-entropy +
λ/2 |W|² with λ = penalty / number of training images, as MSN does (scikit-learn's C = 1 / penalty
for any number of images), until the objective is proven to be within `tolerance` of its minimum or
after `max_passes`. Accuracy on all test images; `_std` is the deviation over the splits of a kind
(unbiased). Seeded splits are not the published lists: say which were used beside a number.
"""


@dataclass(frozen=True)
class LowShotSettings:
    """Which splits, and how the regression is fitted; the penalty is MSN's."""

    num_per_class: tuple[int, ...] = (1, 2, 5)
    """Images of each class, one kind of split for each number."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the training images, one split each."""
    num_splits: int = 3
    """Splits for each number of images per class."""
    seed: int = 0
    """Of the first split; the next ones have the next seeds."""
    penalty: float = 0.00025
    """λ times the number of training images."""
    max_passes: int = 300
    """Passes over the training images, at most."""
    tolerance: float = 1e-3
    """Relative duality gap at which the regression ends."""


def make_splits(
    sets: ImageSets, settings: LowShotSettings, lists: tuple[Path, ...] = ()
) -> dict[str, list[np.ndarray]]:
    """The splits of every kind, sorted indices into the training set; or the lists alone.

    Raises:
        UserError: a class has too few images, or a list does not fit the images.
    """
    info = sets.train.info
    if lists:
        return {"split_list": list(read_lists(info, lists).values())}
    seeds = range(settings.seed, settings.seed + settings.num_splits)
    kinds = {
        f"{count}_per_class": [draw_per_class(info, count, seed) for seed in seeds]
        for count in settings.num_per_class
    }
    for share in settings.fractions:
        kinds[f"{100 * share:g}_percent"] = [draw_fraction(info, share, settings.seed)]
    return kinds


def evaluate(
    data: EncodedSets,
    splits: dict[str, list[np.ndarray]],
    settings: LowShotSettings,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Accuracy of each kind of split, in [0, 1]: mean, and deviation where there are several.

    All ranks must call; each fits its share of the splits.

    Args:
        data: of the images which the splits index.
        splits: as `make_splits` gives them, rows of `data.train`.
    """
    every = [(kind, number) for kind, chosen in splits.items() for number in range(len(chosen))]
    table = torch.zeros(len(every), 3, dtype=torch.float64)
    for i in tracked(range(rank(), len(every), world_size()), "regressions"):
        kind, number = every[i]
        table[i] = torch.tensor(
            _fit(data, splits[kind][number], settings, device), dtype=torch.float64
        )
    rows = dict(zip(every, sum_in_float64(table).tolist(), strict=True))
    result: dict[str, Any] = {}
    for kind, chosen in splits.items():
        accuracies = torch.tensor(
            [rows[kind, i][0] for i in range(len(chosen))], dtype=torch.float64
        )
        result[f"accuracy_{kind}"] = accuracies.mean().item()
        if len(chosen) > 1:
            result[f"accuracy_{kind}_std"] = accuracies.std().item()
    regressions = [
        {"kind": kind, "num_images": len(splits[kind][i]), "accuracy": accuracy,
         "num_passes": int(num_passes), "gap": gap}
        for (kind, i), (accuracy, num_passes, gap) in rows.items()
    ]  # fmt: skip
    return {**result, "splits": regressions, "settings": asdict(settings)}


def _fit(
    data: EncodedSets, rows: np.ndarray, settings: LowShotSettings, device: str | torch.device
) -> tuple[float, int, float]:
    """Accuracy, passes and gap of the regression on some rows of the training set."""
    features = centre_rows(data.train.features[rows].load(device))
    model = fit_regression(
        features,
        data.train.labels[rows].to(device),
        num_classes=data.num_classes,
        penalty=settings.penalty / len(rows),
        max_passes=settings.max_passes,
        tolerance=settings.tolerance,
    )
    parts = data.test.features.parts(device)
    predictions = torch.cat([model.predict(centre_rows(part)).cpu() for part in parts])
    return _accuracy(predictions, data.test), model.num_passes, model.gap


def _accuracy(predictions: Tensor, test: LabelledFeatures) -> float:
    return (predictions == test.labels).double().mean().item()


def _run(args: argparse.Namespace) -> None:
    settings = LowShotSettings(
        tuple(args.num_per_class),
        tuple(args.fractions),
        args.num_splits,
        args.seed,
        args.penalty,
        args.max_passes,
        args.tolerance,
    )
    sets = ImageSets(args.train, args.test)
    splits = make_splits(sets, settings, tuple(args.split_list or ()))
    if not splits:
        raise UserError("there is no split: give --num_per_class, --fractions or --split_list")
    sets.train.indices = np.unique(np.concatenate([rows for s in splits.values() for rows in s]))
    rows = {
        kind: [np.searchsorted(sets.train.indices, chosen) for chosen in some]
        for kind, some in splits.items()
    }

    def measure(evaluation: cli.Evaluation) -> dict[str, Any]:
        data = evaluation.encode(sets)
        measured = evaluate(data, rows, settings, evaluation.device)
        lists = {"split_list": [str(file) for file in args.split_list or ()]}
        return {**cli.describe(data), **lists, **measured}

    cli.evaluate_encoder(args, "low_shot", measure, _PROTOCOL)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = flags.build_parser("eval/low_shot.py", __doc__)
    flags.add_features_argument(parser)
    flags.add_train_argument(parser)
    default = LowShotSettings()
    parser.add_argument(
        "--num_per_class", type=flags.positive_int, nargs="*", default=default.num_per_class,
        metavar="N", help="images of each class; none for no such splits",
    )  # fmt: skip
    parser.add_argument(
        "--fractions", type=flags.fraction, nargs="*", default=default.fractions,
        metavar="SHARE", help="shares of the training images; none for no such splits",
    )  # fmt: skip
    parser.add_argument(
        "--split_list", type=Path, nargs="+", metavar="FILE",
        help="published lists of file names instead, each a split; --train must be a folder",
    )  # fmt: skip
    parser.add_argument("--num_splits", type=flags.positive_int, default=default.num_splits)
    parser.add_argument("--seed", type=flags.non_negative_int, default=default.seed)
    parser.add_argument("--penalty", type=flags.positive_float, default=default.penalty)
    parser.add_argument("--max_passes", type=flags.positive_int, default=default.max_passes)
    parser.add_argument("--tolerance", type=flags.positive_float, default=default.tolerance)
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())
