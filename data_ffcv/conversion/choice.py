"""Which samples of a source go into which file, and in which order."""

import numpy as np

from data_ffcv.errors import DataError
from data_ffcv.splits import conversion_order, split_by_class


def choose_samples(
    labels: np.ndarray | None,
    count: int,
    subset: int | float | None,
    split: float | None,
    seed: int,
) -> list[np.ndarray]:
    """Returns the samples of each file to write, in the order of writing.

    Args:
        labels: Class of each sample; None for segmentation, where all are alike.
        count: How many samples there are.
        subset: Number or share of the samples to take; None for all.
        split: Share of these for the first of two files; None for one file.
        seed: Decides which samples are taken, where they go, and their order.

    Raises:
        DataError: subset is too large, or a file would be empty.
    """
    strata = np.zeros(count, np.int64) if labels is None else labels
    parts = [_draw_subset(strata, subset, seed)]
    if split is not None:
        chosen = parts[0]
        parts = [chosen[part] for part in split_by_class(strata[chosen], 1 - split, seed)]
    if not all(map(len, parts)):
        raise DataError("subset or split leaves no image for a file; take a larger share")
    return [part[conversion_order(len(part), seed)] for part in parts]


def _draw_subset(strata: np.ndarray, subset: int | float | None, seed: int) -> np.ndarray:
    """Returns sorted indices of a random subset in which each class keeps its share."""
    if subset is None:
        return np.arange(len(strata))
    size = round(subset * len(strata)) if isinstance(subset, float) else subset
    if size > len(strata):
        raise DataError(f"subset {size} is more than the {len(strata)} images there are; lower it")
    order = np.random.default_rng([seed, 1]).permutation(len(strata))
    # How far each sample is through its class in that order; the smallest come first.
    progress = np.empty(len(strata))
    for label in np.unique(strata):
        members = np.flatnonzero(strata[order] == label)
        progress[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(progress, kind="stable")[:size]])
