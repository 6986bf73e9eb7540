"""Splitting sample indices: by class into two parts, and over ranks."""

import numpy as np

from data_ffcv.errors import DataError


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the samples in two, with every class in the same proportion.

    Args:
        labels: Class of each sample, shape [num_samples].
        fraction: Size of the second part relative to the whole, in (0, 1).
        seed: Decides which samples go where; equal seeds give equal splits.

    Returns:
        (rest, part): sorted int64 indices. A class of two or more samples is in both.

    Raises:
        DataError: fraction is outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction must be between 0 and 1, got {fraction}")
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    in_part = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(len(members) * fraction)
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        in_part[members[:count]] = True
    return np.flatnonzero(~in_part), np.flatnonzero(in_part)


def shard_indices(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Returns the samples of one rank; over all ranks each sample occurs exactly once.

    Ranks may differ by one sample: nothing is padded or doubled, so evaluation counts are exact.
    """
    check_rank(rank, world_size)
    return np.asarray(indices)[rank::world_size]


def check_rank(rank: int, world_size: int) -> None:
    """Raises DataError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise DataError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")


def conversion_order(num_samples: int, seed: int = 0) -> np.ndarray:
    """Returns the order in which the converter writes samples, int64 [num_samples].

    Shuffled, because readers that go through a file page by page would otherwise meet one class
    at a time.
    """
    return np.random.default_rng(seed).permutation(num_samples)
