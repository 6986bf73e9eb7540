"""Checkpoints are taken over by another number of ranks, at another stage, in another precision."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.reshard_cases import CASES, NUM_STEPS
from tests.ranks import run_ranks
from tests.runs import NUM_IMAGES, Setup, metrics_rows
from tests.training.test_program import recipe as toy_recipe

NUM_CYCLES = 2 * (NUM_IMAGES // 16)  # of the toy
TOY = {"program": "tests.training.toy:ToyProgram"}
FROM = {2: 1, 1: 2}  # ranks that take over: ranks that wrote
STAGES = {2: 3, 1: 0}  # of the runs that take over


@pytest.fixture(scope="module")
def outcomes(module_setup: Setup, beton: Path) -> dict[str, Any]:
    """What the first rank returned: one rank begins, two take over and begin, one takes over."""
    folder = module_setup.folder
    toy = toy_recipe(folder, beton)

    def launches(run: str, stage: int, **more: Any) -> list[dict[str, Any]]:
        return [
            module_setup.launch(f"toy_{run}", recipe=toy, stage=stage, **TOY, **more),
            module_setup.launch(f"mlo_{run}", stage=stage, **more),
        ]

    def stopped(world_size: int) -> list[dict[str, Any]]:
        runs = launches(f"by_{world_size}", 2)
        return [run | {"kill": (0, cycle)} for run, cycle in zip(runs, (6, 1), strict=True)]

    def continued(world_size: int) -> list[dict[str, Any]]:
        for name in ("toy", "mlo"):
            begun = folder / f"{name}_by_{FROM[world_size]}"
            shutil.copytree(begun, folder / f"{name}_to_{world_size}")
        return launches(f"to_{world_size}", STAGES[world_size], resume=True)

    def start(name: str, world_size: int, **arguments: Any) -> None:
        home, pieces = folder / f"ranks_{name}", str(folder / "pieces")
        work = "tests.checkpoint.reshard_cases:work"
        found[name] = run_ranks(work, world_size, home, pieces=pieces, **arguments)[0]

    def kinds(name: str) -> dict[Any, list[str]]:
        return {case: whole["kinds"] for case, whole in found[name][0].items()}

    found: dict[str, Any] = {}
    start("by_1", 1, launches=stopped(1))
    runs = [*launches("whole", 2), *stopped(2), *continued(2)]
    start("to_2", 2, source="1", kinds=kinds("by_1"), launches=runs)
    found["by_2"] = found["to_2"]
    runs = continued(1)
    start("to_1", 1, source="2", kinds=kinds("by_2"), launches=runs, writes=False)
    return found


@pytest.mark.parametrize("world_size", FROM)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_is_taken_over(outcomes: Any, world_size: int, case: Any) -> None:
    """Also what the model computes with, which is the masters in its precision."""
    written, taken = outcomes[f"by_{FROM[world_size]}"][0], outcomes[f"to_{world_size}"][1]
    for (source, target), found in taken.items():
        if target != case:
            continue
        expected = written[source]
        for name, value in found.items():
            wanted = expected[name]  # of the writer's precision
            if name.startswith("computes/") and "untrained" not in name:
                wanted = expected[name.replace("computes", "master")]
            assert torch.equal(value, wanted.to(value.dtype)), (source, name)
        assert any(value.any() for name, value in found.items() if name.startswith("average/"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_levels_had_something_to_hand_over(outcomes: Any, case: Any) -> None:
    whole = outcomes["by_2"][0][case]
    kinds = ["momentum_buffer"] if case[2] == "sgd" else ["exp_avg", "exp_avg_sq"]
    assert whole["kinds"] == kinds
    assert all(whole[f"{kind}/first.weight"].any() for kind in kinds)
    assert whole["buffer/mean"].any()
    # under bf16, DeepSpeed begins stage 0 with an empty step
    assert float(whole["step"]) in ((0,) if case[2] == "sgd" else (NUM_STEPS, NUM_STEPS + 1))


@pytest.mark.parametrize("world_size", FROM)
def test_no_image_is_lost_or_seen_twice(
    outcomes: Any, module_setup: Setup, world_size: int
) -> None:
    """Each place of the global batches has seen the same images, whoever loaded them."""
    launches = outcomes[f"to_{world_size}"][2]
    assert [code for code, _ in launches[-2:]] == [0, 0], launches
    last = f"checkpoints/step_{NUM_CYCLES:08d}"
    seen = []
    for run in ("toy_whole", f"toy_to_{world_size}"):
        files = sorted((module_setup.folder / run / last).glob("own_*.safetensors"))
        seen.append(torch.cat([load_file(file)["seen"] for file in files]))
    assert torch.equal(*seen)
    models = [
        load_file(module_setup.folder / run / last / "model.safetensors")["weight"]
        for run in ("toy_whole", f"toy_to_{world_size}")
    ]
    torch.testing.assert_close(*models, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", FROM)
def test_the_losses_go_on(outcomes: Any, module_setup: Setup, world_size: int) -> None:
    """Masks and dropout are drawn anew, so they agree as two seeds do, and the rates exactly."""
    whole, other = (
        metrics_rows(module_setup.folder / f"mlo_{run}") for run in ("whole", f"to_{world_size}")
    )
    assert [r["cycle"] for r in whole] == [r["cycle"] for r in other]
    assert (whole[:2] == other[:2]) == (world_size == 1)  # begun by two ranks, as the whole one
    for ours, theirs in zip(whole[2:], other[2:], strict=True):
        for level, tolerance in (("pretrain", 0.1), ("classifier", 0.3), ("mask", 0.3)):
            assert ours[f"{level}/lr"] == theirs[f"{level}/lr"]
            assert ours[f"{level}/step"] == theirs[f"{level}/step"]
            assert theirs[f"{level}/loss"] == pytest.approx(ours[f"{level}/loss"], rel=tolerance)
    stderr = outcomes[f"to_{world_size}"][2][-1][1]
    assert f"it was written by {FROM[world_size]} ranks, these are {world_size}" in stderr
    last = module_setup.folder / f"mlo_to_{world_size}/checkpoints/step_00000008"
    state = json.loads((last / "state.json").read_text())
    assert state["world_size"] == world_size
    assert state["levels"]["mask"]["zero_stage"] == STAGES[world_size]
