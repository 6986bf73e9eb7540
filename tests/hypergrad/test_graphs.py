"""Level graphs on real DeepSpeed engines against the float64 reference: stages, ranks, steps."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.hypergrad.brute_force import relative_error
from tests.ranks import run_ranks

CASES = "tests.hypergrad.graph_cases"
CONFIGS = ("zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_bf16_cpu_offload")
SETTINGS: dict[str, dict[str, Any]] = {
    "one step": {"problem": "chain2", "num_steps": 1},
    "two steps": {"problem": "chain3", "num_steps": 2},
    "three steps, momentum": {"problem": "chain2", "num_steps": 3, "kind": "momentum"},
    "five steps": {"problem": "chain2", "num_steps": 5},
    "diamond": {"problem": "diamond", "num_steps": 2},
    "rates": {"problem": "settings", "num_steps": 2},
    "coupled": {"problem": "coupled", "num_steps": 2},
    "shared": {"problem": "shared", "num_steps": 2},
    "clipped": {"problem": "chain3", "num_steps": 2, "num_micro": 2, "max_norm": 0.05},
}


IN_BF16 = ("one step", "two steps", "five steps", "diamond", "clipped")
AT_ANY_SIZE = ("two steps", "rates", "clipped")


def cases_of(
    dtype: str, settings: Iterable[str], configs: tuple[str, ...] = CONFIGS
) -> dict[tuple[str, str], Any]:
    return {
        (shipped, name): {"shipped": shipped, "dtype": dtype, **SETTINGS[name]}
        for shipped in configs
        for name in settings
    }


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], Any]]:
    """Every case in one pair of processes, because starting them costs more than running."""
    found = {}
    for dtype, settings in (("fp32", SETTINGS), ("bf16", IN_BF16)):
        cases = cases_of(dtype, settings)
        folder = tmp_path_factory.mktemp(dtype)
        ranks = run_ranks(f"{CASES}:against_reference", 2, folder, cases=list(cases.values()))
        assert ranks[0] == ranks[1]  # the hypergradient is the same on every rank
        found[dtype] = dict(zip(cases, ranks[0], strict=True))
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shipped", CONFIGS)
def test_fp32_equals_the_reference(errors: dict[str, Any], shipped: str, setting: str) -> None:
    assert max(cycle["error"] for cycle in errors["fp32"][shipped, setting]) <= 1e-5


@pytest.mark.parametrize("setting", IN_BF16)
@pytest.mark.parametrize("shipped", CONFIGS)
def test_bf16_is_close(errors: dict[str, Any], shipped: str, setting: str) -> None:
    cycles = errors["bf16"][shipped, setting]
    assert statistics.median(cycle["error"] for cycle in cycles) <= 5e-2
    assert statistics.median(cycle["cosine"] for cycle in cycles) >= 0.999


def test_four_ranks_and_one_equal_the_reference_too(tmp_path: Path) -> None:
    # The reference sees the batches of all ranks as one, so N ranks equal one with N times as many.
    cases = list(cases_of("fp32", AT_ANY_SIZE, ("zero2_bf16", "zero3_bf16")).values())
    for n in (1, 4):
        ranks = run_ranks(f"{CASES}:against_reference", n, tmp_path / str(n), cases=cases)
        for case, cycles in zip(cases, ranks[0], strict=True):
            assert cycles[0]["error"] <= 1e-5, (n, case)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_records_and_vectors_shrink_with_the_ranks(tmp_path: Path, dtype: str) -> None:
    cases = [
        {"problem": "chain2", "shipped": shipped, "dtype": dtype, "num_steps": 3}
        for shipped in ("zero1_bf16", "zero2_bf16", "zero3_bf16")
    ]
    found = {
        n: run_ranks(f"{CASES}:shard_bytes", n, tmp_path / str(n), cases=cases) for n in (1, 2, 4)
    }
    for i, case in enumerate(cases):
        alone = found[1][0][i]
        # Each of 3 steps: weights in compute precision, and gradient and two moments in float32.
        per_weight = {"fp32": 4, "bf16": 2}[dtype] + 3 * 4
        assert alone["num_records"] == 3
        assert alone["records"] == pytest.approx(3 * per_weight * alone["numel"], rel=0.02)
        for n in (2, 4):
            for rank in found[n]:
                for kind in ("records", "vector"):
                    # Shards are padded, by a few elements of each of these tiny parameters.
                    assert rank[i][kind] <= 1.15 * alone[kind] / n, (n, case, kind)


def test_cycles_train_alike_on_every_stage(tmp_path: Path) -> None:
    cases = [
        {"problem": "chain3", "shipped": shipped, "dtype": "fp32", "num_steps": 2}
        for shipped in CONFIGS
    ]
    (results, _) = run_ranks(f"{CASES}:cycles_train", 2, tmp_path, cases=cases)
    first = {name: value.double() for name, value in results[0]["weights"].items()}
    for case, result in zip(cases, results, strict=True):
        assert result["moved"] > 1e-6, case
        assert result["losses"] == [
            pytest.approx(found, rel=1e-4) for found in results[0]["losses"]
        ]
        assert relative_error(result["weights"], first) <= 1e-5, case
