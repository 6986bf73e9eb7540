"""The two tasks of pretraining: which levels a cycle steps, how often, and what it leaves."""

from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import Setup, build_task


def cycles(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two cycles of each launch's task: steps by level, metrics, files of weights, pictures."""
    from contextlib import ExitStack

    from mlomae.pretraining.program import PretrainingProgram

    outcomes = []
    for launch in launches:
        task = build_task(PretrainingProgram(), launch)
        with ExitStack() as stack:
            task.open(0, stack)
            for _ in range(2):
                task.cycle()
            outcomes.append(
                {
                    "task": type(task).__name__,
                    "steps": {n: level.num_steps_done for n, level in task.levels.items()},
                    "record": task.meters.reduce(),
                    "files": {file: sorted(tensors) for file, tensors in task.weights()},
                    "pictures": {name: p.shape for name, p in task.pictures().items()},
                    "report": task.report(),
                }
            )
        for level in task.levels.values():
            level.engine.destroy()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(module_setup: Setup) -> dict[str, dict[str, Any]]:
    methods = ("mae", "mlo_mae")
    launches = [module_setup.launch(f"task_{method}", method=method) for method in methods]
    ranks = run_ranks(f"{__name__}:cycles", 2, module_setup.folder / "tasks", launches=launches)
    return dict(zip(methods, ranks[0], strict=True))


def test_mae_steps_the_encoder_alone(outcomes: Any) -> None:
    outcome = outcomes["mae"]
    assert outcome["task"] == "MaePretraining"
    assert outcome["steps"] == {"pretrain": 4}  # two a cycle
    assert outcome["report"] == []
    assert list(outcome["files"]) == ["model.safetensors"]


def test_mlo_mae_steps_three_levels_and_the_mask_once_a_cycle(outcomes: Any) -> None:
    outcome = outcomes["mlo_mae"]
    assert outcome["task"] == "MloMaePretraining"
    assert outcome["steps"] == {"pretrain": 4, "classifier": 2, "mask": 2}
    assert list(outcome["files"]) == ["model.safetensors", "masking.safetensors"]
    ((what, shares),) = outcome["report"]
    assert what == "labels" and "64 for classifier, 16 for mask" in shares


def test_only_learned_scores_are_recorded(outcomes: Any) -> None:
    names = {method: set(outcome["record"]) for method, outcome in outcomes.items()}
    learned = {
        *(f"{name}/{value}" for name in ("classifier", "mask") for value in ("loss", "lr")),
        *("classifier/grad_norm", "mask/hypergradient_norm"),
        *(f"masking/score_{value}" for value in ("mean", "std", "entropy")),
        *("time/classifier_step", "time/mask_step"),
    }
    assert names["mlo_mae"] - names["mae"] == learned
    assert {"pretrain/loss", "pretrain/lr", "pretrain/grad_norm"} <= names["mae"]


@pytest.mark.parametrize("method", ["mae", "mlo_mae"])
def test_the_picture_has_a_row_for_each_image(outcomes: Any, method: str) -> None:
    ((name, shape),) = outcomes[method]["pictures"].items()
    assert name == "masks" and shape[2] == 3
