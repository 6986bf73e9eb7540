"""Splits and shards keep every sample exactly once."""

import numpy as np
import pytest

from data_ffcv import DataError, shard_indices, split_by_class

LABELS = np.repeat([0, 1, 2], [100, 50, 10])


def test_split_is_stratified_complete_and_sorted():
    rest, part = split_by_class(LABELS, 0.2, seed=3)
    assert np.bincount(LABELS[part]).tolist() == [20, 10, 2]
    assert sorted([*rest, *part]) == list(range(160))
    assert (np.diff(part) > 0).all() and (np.diff(rest) > 0).all()
    assert rest.dtype == part.dtype == np.int64


def test_split_depends_on_the_seed_alone():
    assert np.array_equal(split_by_class(LABELS, 0.2, 3)[1], split_by_class(LABELS, 0.2, 3)[1])
    assert not np.array_equal(split_by_class(LABELS, 0.2, 3)[1], split_by_class(LABELS, 0.2, 4)[1])


def test_rare_class_is_in_both_parts():
    rest, part = split_by_class(np.array([0] * 50 + [1] * 2), 0.01, seed=0)
    assert {50, 51} & set(part) and {50, 51} & set(rest)


@pytest.mark.parametrize("fraction", [0, 1, 1.5])
def test_split_refuses_fraction(fraction: float):
    with pytest.raises(DataError, match="fraction"):
        split_by_class(LABELS, fraction, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_partition(world_size: int):
    shards = [shard_indices(np.arange(10, 33), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shards)) == list(range(10, 33))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shard_refuses_rank():
    with pytest.raises(DataError, match="rank"):
        shard_indices(np.arange(4), 2, 2)
