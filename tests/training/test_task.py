"""What tasks share: how long a run is, and which batch a level's stream begins with."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.training.task import Task, count_cycles
from tests.ranks import run_ranks


def recipe_of(batch_size: int = 16, steps_per_cycle: int = 2, epochs: float = 3.0) -> Any:
    level = SimpleNamespace(batch_size=batch_size, steps_per_cycle=steps_per_cycle)
    return SimpleNamespace(levels={"first": level}, epochs=epochs)


class Plain(Task):
    """A task that does nothing of its own."""

    def open(self, cycle: int, stack: ExitStack) -> None:
        raise AssertionError

    def cycle(self) -> None:
        raise AssertionError


def task_of(recipe: Any, num_images: int) -> Plain:
    level = SimpleNamespace(
        engine=SimpleNamespace(device=torch.device("cpu")),
        latest_loss=0.5,
        lr=0.25,
        grad_norm=2.0,
    )
    return Plain(recipe, {"first": level}, num_images)  # type: ignore[dict-item]


# batches of an epoch are whole: 5 of 16 in 80 images, as in 95
@pytest.mark.parametrize(
    ("num_images", "changes", "num_cycles"),
    [
        (80, {}, 8),  # 15 steps, two of them in a cycle, to the nearest
        (95, {}, 8),
        (80, {"steps_per_cycle": 1}, 15),
        (80, {"epochs": 0.01}, 1),  # at least one
        (1_281_167, {"batch_size": 4096, "steps_per_cycle": 1, "epochs": 800.0}, 249_600),
    ],
)
def test_cycles_are_those_of_the_epochs(num_images, changes, num_cycles):
    recipe = recipe_of(**changes)
    assert count_cycles(recipe, num_images) == num_cycles
    assert task_of(recipe, num_images).num_cycles == num_cycles


def test_an_epoch_is_as_many_cycles_as_show_all_images_once():
    task = task_of(recipe_of(), 80)
    assert (task.images_per_cycle, task.cycles_per_epoch) == (32, 2.5)
    assert task.first_level is task.levels["first"]


def means(root: str) -> list[list[float]]:
    """What two ranks' meters make of three steps."""
    task = task_of(recipe_of(), 80)
    for loss in (1.0, 2.0, 6.0):
        task.first_level.latest_loss = loss * (1 + torch.distributed.get_rank())
        task.measure("first")
        task.measure("first", norm="hypergradient_norm")
    record = task.meters.reduce()
    names = ("first/loss", "first/lr", "first/grad_norm", "first/hypergradient_norm")
    return [record[name] for name in names]


def test_measures_are_means_over_steps_and_ranks(tmp_path: Path) -> None:
    for record in run_ranks(f"{__name__}:means", 2, tmp_path, root=str(tmp_path)):
        assert record == pytest.approx([4.5, 0.25, 2.0, 2.0])


def test_a_task_without_state_keeps_none():
    task = task_of(recipe_of(), 80)
    assert (task.evaluate(), task.pictures(), task.vectors(), task.report()) == ({}, {}, {}, [])
    nothing: dict[str, Tensor] = {}
    assert task.shared_state() == task.rank_state() == nothing
    task.load_state(nothing, nothing)
    with pytest.raises(AssertionError):
        task.load_state({"x": torch.zeros(1)}, nothing)
