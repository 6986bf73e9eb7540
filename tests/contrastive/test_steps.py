"""The three steps on two real ranks at every ZeRO stage: they train, agree, stop and go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from tests.contrastive.runs import NUM_STEPS, Setup
from tests.ranks import run_ranks
from tests.runs import checkpoints, contents, metrics_rows

LAST = f"checkpoints/step_{NUM_STEPS:08d}"
STAGES = (0, 1, 2, 3)
STOPPED = {2: [("tune", 1, 2)], 3: [("head", 1, 0), ("tune", 0, 1)]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folder of all runs, and the exit codes of the launches of each run."""
    setup = Setup(tmp_path_factory.mktemp("steps"))
    launches = {"zero0": [setup.launch("zero0", stage=0)]}  # pretrains for all
    given = (f"init_from={setup.folder / 'zero0' / 'pretrain'}",)
    for stage in STAGES[1:]:
        launches[f"zero{stage}"] = [setup.launch(f"zero{stage}", *given, stage=stage)]
    for stage, kills in STOPPED.items():
        halves = [setup.launch(f"halves{stage}", *given, stage=stage, kill=kill) for kill in kills]
        halves.append(setup.launch(f"halves{stage}", *given, stage=stage))
        for later in halves[1:]:
            later["resume"] = True
        launches[f"halves{stage}"] = halves
    sharded = ("nnclr.queue_layout=sharded", *given)
    launches["sharded"] = [
        setup.launch("sharded", *sharded, kill=("head", 1, 2)),
        setup.launch("sharded", *sharded, resume=True),
    ]
    launches["bf16"] = [setup.launch("bf16", *sharded, stage=3, bf16=True)]
    launches["zero0"].append(setup.launch("zero0", stage=0, step="tune"))  # finished already
    flat = [(name, launch) for name, own in launches.items() for launch in own]
    ranks = run_ranks(
        "tests.contrastive.runs:drive", 2, setup.folder / "ranks", launches=[x for _, x in flat]
    )
    codes: dict[str, list[int]] = {name: [] for name in launches}
    for (name, _), (code, _), (other, _) in zip(flat, *ranks, strict=True):
        assert code == other
        codes[name].append(code)
    return setup.folder, codes


def test_all_steps_end(runs: Any) -> None:
    folder, codes = runs
    for name, own in codes.items():
        num_stops = {"sharded": 1}.get(name, 0)
        num_stops = len(STOPPED[int(name[-1])]) if name.startswith("halves") else num_stops
        assert own == [143] * num_stops + [0] * (len(own) - num_stops), name
        for step in ("head", "tune"):
            assert (folder / name / step / "summary.json").is_file()
            assert f"step_{NUM_STEPS:08d}" in checkpoints(folder / name / step)
    assert (folder / "zero0/pretrain/summary.json").is_file()
    assert not (folder / "zero1/pretrain").exists()


@pytest.mark.parametrize("other", ["zero1", "zero2", "zero3", "sharded"])
@pytest.mark.parametrize("step", ["head", "tune"])
def test_stages_and_layouts_of_the_queue_agree(runs: Any, step: str, other: str) -> None:
    folder, _ = runs
    expected, found = (metrics_rows(folder / run / step) for run in ("zero0", other))
    assert len(found) == len(expected) == NUM_STEPS
    for one, two in zip(expected, found, strict=True):
        for key in (f"{step}/loss", f"{step}/grad_norm", f"{step}/nearest_neighbor_accuracy"):
            assert one[key] == pytest.approx(two[key], rel=2e-4)
        assert one[f"{step}/lr"] == two[f"{step}/lr"]
    first, last = expected[0][f"{step}/loss"], expected[-1][f"{step}/loss"]
    assert abs(first - last) > 1e-3  # it does train


@pytest.mark.parametrize("step", ["head", "tune"])
@pytest.mark.parametrize("stage", STOPPED)
def test_resuming_changes_no_bit(runs: Any, stage: int, step: str) -> None:
    folder, _ = runs
    whole, halves = (folder / f"{name}{stage}" / step for name in ("zero", "halves"))
    expected = contents(whole / LAST)
    found = contents(halves / LAST)
    for name in ("queue", "queue_ptr", *(["target.0.weight"] * (step == "tune"))):
        assert f"shared.safetensors/{name}" in expected
    if step == "tune":
        assert any("/average/encoder." in name for name in expected)
    assert found == expected
    assert metrics_rows(halves) == metrics_rows(whole)


def test_resuming_a_queue_in_parts_changes_no_bit(runs: Any) -> None:
    """Its vectors are each rank's own; a head file holds them all."""
    folder, _ = runs
    run = folder / "sharded/head"
    parts = [load_file(run / LAST / f"own_0000{rank}.safetensors")["queue"] for rank in (0, 1)]
    whole = load_file(run / LAST / "head.safetensors")
    assert torch.equal(torch.cat(parts), whole["queue"])
    expected = load_file(folder / "zero2/head" / LAST / "head.safetensors")
    assert torch.equal(whole["queue_id"], expected["queue_id"])
    torch.testing.assert_close(whole["queue"], expected["queue"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", ["zero0", "zero3", "bf16"])
def test_a_tuned_run_holds_the_averaged_encoder_and_the_last_one(runs: Any, run: str) -> None:
    """Frozen weights are those of pretraining, bit by bit, whatever computed with them."""
    folder, _ = runs
    start = load_file(next((folder / "zero0/pretrain/checkpoints").glob("step_*/model.*")))
    files = ("model.safetensors", "last_model.safetensors")
    averaged, last = (load_file(folder / run / "tune" / LAST / file) for file in files)
    untouched = load_file(folder / run / "head" / LAST / "model.safetensors")
    assert averaged.keys() == last.keys() == untouched.keys()
    for name, tensor in untouched.items():
        assert torch.equal(tensor, start[name])
        if name.startswith(("blocks.1.", "norm.")):
            moved = (last[name] - start[name]).norm()
            assert moved > 0 and 0 < (averaged[name] - start[name]).norm() < moved
        else:
            assert torch.equal(averaged[name], start[name]) and torch.equal(last[name], start[name])
    vit = VisionTransformer(8, 2, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    vit.load_state_dict(averaged)  # all of timm's names, and no other


@pytest.mark.parametrize("run", ["zero0", "zero3", "bf16"])
def test_a_head_file_holds_projectors_and_queue(runs: Any, run: str) -> None:
    folder, _ = runs
    before, after = (
        load_file(folder / run / step / LAST / "head.safetensors") for step in ("head", "tune")
    )
    assert {name.split(".")[0] for name in before} == {
        *("projector", "predictor", "queue", "queue_y", "queue_id", "queue_ptr")
    }
    for name in (n for n in before if n.startswith("projector.") and n.endswith("weight")):
        # The average lies between where it started, a copy of the projector, and the projector.
        target = after[f"target_{name}"]
        assert 0 < (target - before[name]).norm() < (after[name] - before[name]).norm()
    for name in (n for n in before if n.startswith("projector.") and "running" in n):
        assert torch.equal(after[f"target_{name}"], after[name])
    assert after["queue_id"].min() >= 0 and set(after["queue_y"].tolist()) <= {0, 1, 2, 3}
    assert after["queue"].dtype == torch.float32
    assert torch.allclose(after["queue"].norm(dim=1), torch.ones(32), atol=1e-5)


def test_half_precision_trains(runs: Any) -> None:
    folder, _ = runs
    for step in ("head", "tune"):
        expected, found = (metrics_rows(folder / run / step) for run in ("zero3", "bf16"))
        for one, two in zip(expected, found, strict=True):
            assert two[f"{step}/loss"] == pytest.approx(one[f"{step}/loss"], rel=0.2)
