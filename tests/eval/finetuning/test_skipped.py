"""A step of fine-tuning that is skipped on all ranks leaves the averaged weights as they were."""

from pathlib import Path
from typing import Any

from tests.eval.finetuning.runs import FinetuneSetup
from tests.ranks import run_ranks
from tests.runs import build_task

STAGES = (0, 2, 3)


def cycles(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the task of each launch changes."""
    from contextlib import ExitStack

    from eval.finetuning.program import FinetuningProgram
    from tests.skipped_steps import around

    outcomes = []
    for launch in launches:
        task = build_task(FinetuningProgram(), launch)
        with ExitStack() as stack:
            task.open(0, stack)
            outcomes.append(around(task))
        task.first_level.engine.destroy()
    return outcomes


def test_the_average_follows_steps_that_were_taken_on_all_ranks(tmp_path: Path) -> None:
    setup = FinetuneSetup(tmp_path)
    launches = [setup.launch(f"s{stage}", method="plain", stage=stage) for stage in STAGES]
    ranks = run_ranks(f"{__name__}:cycles", 2, tmp_path / "r", launches=launches)
    for rank in ranks:
        for changes in rank:
            assert changes["skipped"] == []
            assert changes["without loss"] == changes["all"] != []
