"""A step that is skipped on all ranks leaves queue and averages of MAE-CT as they were."""

from typing import Any

import pytest

from tests.contrastive.runs import Setup
from tests.ranks import run_ranks


def cycles(first: dict[str, Any], launches: dict[Any, dict[str, Any]]) -> dict[Any, Any]:
    """What the task of each launch changes; `first` makes what they start from."""
    from contextlib import ExitStack

    from mlomae.contrastive.chain import plan_steps
    from mlomae.contrastive.program import HeadProgram, TuneProgram
    from tests.contrastive.runs import drive
    from tests.skipped_steps import around

    assert drive([first])[0][0] == 0
    outcomes = {}
    for (step, layout), launch in launches.items():
        arguments = launch["recipe"], launch["deepspeed_config"], False, launch["overrides"]
        job = plan_steps(*arguments)[step]
        program: Any = HeadProgram() if step == "head" else TuneProgram()
        program.check(job)
        task = program.build(job)
        with ExitStack() as stack:
            task.open(0, stack)
            outcomes[step, layout] = around(task)
        task.first_level.engine.destroy()
    return outcomes


LAYOUTS = ("replicated", "sharded")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """By rank, then by step and layout of the queue."""
    setup = Setup(tmp_path_factory.mktemp("skipped"))
    weights = setup.folder / "first"
    start = {"head": [f"init_from={weights / 'pretrain'}"]}
    start["tune"] = [*start["head"], f"head_from={weights / 'head'}"]
    launches = {
        (step, layout): setup.launch(
            f"{step}_{layout}", *overrides, f"nnclr.queue_layout={layout}", stage=2
        )
        for layout in LAYOUTS
        for step, overrides in start.items()
    }
    first = setup.launch("first", stage=2)
    return run_ranks(f"{__name__}:cycles", 2, setup.folder / "r", first=first, launches=launches)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", ["head", "tune"])
def test_a_skipped_step_moves_neither_queue_nor_averages(
    outcomes: Any, step: str, layout: str
) -> None:
    for rank in range(2):
        changes = outcomes[rank][step, layout]
        assert changes["skipped"] == []
        moving = {"queue_id", "queue_ptr"} | ({"average0"} if step == "tune" else set())
        if layout == "replicated" or rank == 0:  # one step fills the other rank's part
            moving |= {"queue"}
        assert moving <= set(changes["without loss"]), (rank, changes)
