"""A run that was stopped and resumed leaves, bit by bit, what one never interrupted leaves."""

import json
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import Setup, checkpoints, contents, metrics_rows

NUM_CYCLES = 4  # in the recipes of `Setup`
IMAGES_PER_CYCLE = 32
# (method, ZeRO stage, rank that gets the signal, in which cycle)
STOPS = [
    ("mlo_mae", 0, 0, 1),
    ("mlo_mae", 1, 1, 0),
    ("mlo_mae", 2, 1, 2),
    ("mlo_mae", 3, 0, 1),
    ("mae", 0, 1, 0),
    ("mae", 2, 0, 1),
]
IDS = [f"{method}-zero{stage}" for method, stage, _, _ in STOPS]


@pytest.fixture(scope="module")
def outcomes(module_setup: Setup) -> list[list[Any]]:
    """Each case's exit codes by rank: uninterrupted, stopped, resumed. One pair of processes."""
    launches = []
    for case, (method, stage, rank, cycle) in zip(IDS, STOPS, strict=True):
        common = {"method": method, "stage": stage}
        launches += [
            module_setup.launch(f"{case}/whole", **common),
            module_setup.launch(f"{case}/halves", **common, kill=(rank, cycle)),
            module_setup.launch(f"{case}/halves", **common, resume=True),
        ]
    sparse = ("monitor.log_interval=2",)
    launches += [
        module_setup.launch("sparse", *sparse, method="mae", kill=(1, 2)),
        module_setup.launch("sparse", *sparse, method="mae", resume=True),
    ]
    ranks = run_ranks("tests.runs:drive", 2, module_setup.folder, launches=launches)
    codes = [[code for code, _ in rank] for rank in ranks]
    assert codes[0] == codes[1]  # the ranks agree
    return [codes[0][i : i + 3] for i in range(0, len(launches), 3)]


@pytest.mark.parametrize("case", range(len(STOPS)), ids=IDS)
def test_resuming_changes_no_bit(outcomes: Any, module_setup: Setup, case: int) -> None:
    assert outcomes[case] == [0, 143, 0]
    whole, halves = (module_setup.folder / IDS[case] / name for name in ("whole", "halves"))
    last, stopped = 2 * NUM_CYCLES, 2 * (STOPS[case][3] + 1)
    assert checkpoints(whole) == ["latest", f"step_{last:08d}"]
    assert checkpoints(halves) == ["latest", f"step_{stopped:08d}", f"step_{last:08d}"]

    expected = contents(whole / "checkpoints" / f"step_{last:08d}")
    assert len(expected) > 100
    assert contents(halves / "checkpoints" / f"step_{last:08d}") == expected
    assert contents(halves / "checkpoints" / f"step_{stopped:08d}") != expected
    assert [record["cycle"] for record in metrics_rows(whole)] == list(range(1, NUM_CYCLES + 1))
    assert metrics_rows(halves) == metrics_rows(whole)
    assert (halves / "masks.png").read_bytes() == (whole / "masks.png").read_bytes()


def test_a_row_says_what_it_averages(outcomes: Any, module_setup: Setup) -> None:
    """Stopped between two rows, the run writes one for what it has, and counts nothing twice."""
    run = module_setup.folder / "sparse"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["cycle"] for line in lines] == [2, 3, 4]
    seconds = [line["seconds"] for line in lines]
    for i, num_cycles in ((1, 1), (2, 1)):
        rate = num_cycles * IMAGES_PER_CYCLE / (seconds[i] - seconds[i - 1])
        assert lines[i]["images_per_second"] == pytest.approx(rate)
