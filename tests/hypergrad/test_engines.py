"""The hypergradient through real DeepSpeed engines: two gloo processes, ZeRO 0 to 3."""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hypergrad.brute_force import relative_error
from tests.ranks import run_ranks

CASES = "tests.hypergrad.engine_cases"
SETTINGS = {
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    "accumulated and clipped": {"optimizer": "adamw", "micro": 2, "gradient_clipping": 0.05},
}
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], Any]:
    """Every case in one pair of processes, because starting them costs more than running."""
    keys = [(stage, d, s) for stage in STAGES for d in ("fp32", "bf16") for s in SETTINGS]
    cases = [{"stage": stage, "dtype": d, **SETTINGS[s]} for stage, d, s in keys]
    folder = tmp_path_factory.mktemp("brute_force")
    results = run_ranks(f"{CASES}:against_brute_force", 2, folder, cases=cases)
    assert results[0] == results[1]  # the gathered gradient is the same on every rank
    return dict(zip(keys, results[0], strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_equals_brute_force(errors: dict[Any, Any], stage: int, setting: str) -> None:
    assert max(cycle["error"] for cycle in errors[stage, "fp32", setting]) <= 1e-5


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_close(errors: dict[Any, Any], stage: int, setting: str) -> None:
    # The median: where a rectifier of the masking network switches under bf16 rounding, the two
    # sides compute different functions and no estimator could agree.
    cycles = errors[stage, "bf16", setting]
    assert statistics.median(cycle["error"] for cycle in cycles) <= 5e-2
    assert statistics.median(cycle["cosine"] for cycle in cycles) >= 0.999


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_leaves_no_trace(tmp_path: Path, dtype: str) -> None:
    cases = [{"stage": stage, "dtype": dtype, "optimizer": "adamw"} for stage in STAGES]
    for rank in run_ranks(f"{CASES}:leaves_no_trace", 2, tmp_path, cases=cases):
        for case, result in zip(cases, rank, strict=True):
            assert result["after"] == result["before"], case
            without, with_probe = result["futures"]
            assert with_probe == without, case


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_more_ranks_change_nothing(tmp_path: Path, stage: int) -> None:
    alone, several = (
        run_ranks(f"{CASES}:same_at_any_world_size", n, tmp_path / str(n), stage=stage)[0]
        for n in (1, 2)
    )
    reference = {name: value.double() for name, value in alone.items()}
    assert relative_error(several, reference) <= 1e-5
    assert all(torch.isfinite(value).all() for value in several.values())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bad_numbers_on_one_rank_stop_no_other(tmp_path: Path, stage: int) -> None:
    for result in run_ranks(f"{CASES}:bad_numbers", 2, tmp_path, stage=stage):
        assert result["unchanged"]
        assert result["skipped"] == (1, 0, 1)  # no record below, so the mask stays, too
        assert result["recovered"] == (0, 0)
        assert result["finite"]
        assert "3 steps in a row" in result["message"] and "pretrain.lr" in result["message"]
