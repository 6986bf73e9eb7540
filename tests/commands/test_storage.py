"""Bytes of storages: each counts once, in its part, until its last tensor is gone."""

import torch

from mlomae.commands.storage import StorageCounter, tensors_in


def test_views_share_a_storage_that_counts_until_the_last_of_them_is_freed() -> None:
    storages = StorageCounter()
    tensor = torch.empty(100, device="meta")
    view = tensor[:10]
    storages.add(tensor, "weights")
    storages.add(view, "buffers")
    assert dict(storages.live) == {"weights": 400} and storages.total == 400
    del tensor
    assert storages.total == 400
    del view
    assert storages.live["weights"] == storages.total == 0


def test_a_moved_storage_counts_and_is_freed_as_another_part() -> None:
    storages = StorageCounter(outside=frozenset({"host"}))
    tensor = torch.empty(100, device="meta")
    storages.add(tensor, "host")
    assert (storages.live["host"], storages.total) == (400, 0)
    storages.move(tensor, "gradients")
    assert (storages.live["host"], storages.live["gradients"], storages.total) == (0, 400, 400)
    del tensor
    assert (storages.live["gradients"], storages.total) == (0, 0)


def test_what_has_no_part_takes_no_bytes_and_stays_so() -> None:
    storages = StorageCounter()
    tensor = torch.empty(100)
    for part in (None, "weights"):
        storages.add(tensor, part)
    storages.move(tensor, "gradients")
    assert storages.total == 0 and not any(storages.live.values())


def test_tensors_are_taken_from_nested_tuples_and_lists() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert [int(t) for t in tensors_in((a, [None, (b, 3)], {"c": a}))] == [0, 1]
