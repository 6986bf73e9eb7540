"""The hypergradient through real DeepSpeed engines: two processes, all shipped configs."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.hypergrad.brute_force import relative_error
from tests.ranks import run_ranks

CASES = "tests.hypergrad.engine_cases"
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "sgd, fixed positions": {"optimizer": "sgd", "trainable_positions": False},
    "accumulated and clipped": {"optimizer": "adamw", "micro": 2, "gradient_clipping": 0.05},
}
SETTINGS["light, coupled, normalized, drawn"] = {
    "optimizer": "adamw", "light": True, "coupled": True, "normalized": True, "temperature": 1.0,
}  # fmt: skip
IN_BF16 = ("adamw", "accumulated and clipped", "light, coupled, normalized, drawn")
CONFIGS = (
    "zero0_bf16",
    "zero1_bf16",
    "zero2_bf16",
    "zero2_bf16_cpu_offload",
    "zero3_bf16",
    "zero3_bf16_cpu_offload",
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """Every case in one pair of processes, because starting them costs more than running."""
    settings = {"fp32": tuple(SETTINGS), "bf16": IN_BF16}
    keys = [(shipped, d, s) for shipped in CONFIGS for d in settings for s in settings[d]]
    cases = [{"shipped": shipped, "dtype": d, **SETTINGS[s]} for shipped, d, s in keys]
    folder = tmp_path_factory.mktemp("brute_force")
    results = run_ranks(f"{CASES}:against_brute_force", 2, folder, cases=cases)
    assert results[0] == results[1]  # the gathered gradient is the same on every rank
    return dict(zip(keys, results[0], strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shipped", CONFIGS)
def test_fp32_equals_brute_force(errors: dict[Any, Any], shipped: str, setting: str) -> None:
    assert max(cycle["error"] for cycle in errors[shipped, "fp32", setting]) <= 1e-5


@pytest.mark.parametrize("setting", IN_BF16)
@pytest.mark.parametrize("shipped", CONFIGS)
def test_bf16_is_close(errors: dict[Any, Any], shipped: str, setting: str) -> None:
    # The median: where a rectifier of the masking network switches under bf16 rounding, the two
    # sides compute different functions and no estimator could agree.
    cycles = errors[shipped, "bf16", setting]
    assert statistics.median(cycle["error"] for cycle in cycles) <= 5e-2
    assert statistics.median(cycle["cosine"] for cycle in cycles) >= 0.999


def test_leaves_no_trace(tmp_path: Path) -> None:
    cases = [
        {"shipped": shipped, "dtype": dtype, "optimizer": "adamw"}
        for shipped in CONFIGS
        for dtype in ("fp32", "bf16")
    ]
    for rank in run_ranks(f"{CASES}:leaves_no_trace", 2, tmp_path, cases=cases):
        for case, result in zip(cases, rank, strict=True):
            assert result["after"] == result["before"], case
            without, with_probe = result["futures"]
            assert with_probe == without, case


def test_more_ranks_change_nothing(tmp_path: Path) -> None:
    alone, several = (
        run_ranks(f"{CASES}:same_at_any_world_size", n, tmp_path / str(n), configs=list(CONFIGS))
        for n in (1, 2)
    )
    for shipped in CONFIGS:
        reference = {name: value.double() for name, value in alone[0][shipped].items()}
        assert relative_error(several[0][shipped], reference) <= 1e-5, shipped


def test_bad_numbers_on_one_rank_stop_no_other(tmp_path: Path) -> None:
    for rank in run_ranks(f"{CASES}:bad_numbers", 2, tmp_path, configs=list(CONFIGS)):
        for shipped, result in rank.items():
            assert result["unchanged"], shipped
            assert result["skipped"] == (1, 0, 0), shipped
            assert result["mask unchanged"], shipped  # no record below: the mask stays, too
            assert result["recovered"] == (0, 0), shipped
            assert result["finite"], shipped
            assert "3 steps in a row" in result["message"] and "pretrain.lr" in result["message"]
