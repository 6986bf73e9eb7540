"""Level graphs on real DeepSpeed engines against the float64 reference: stages, ranks, steps."""

import statistics
from collections.abc import Iterable
from typing import Any

import pytest

from mlomae.hypergrad import ConjugateGradient, FiniteDifference, Neumann, Unrolled
from tests.hypergrad.brute_force import relative_error
from tests.ranks import run_ranks

CASES = "tests.hypergrad.graph_cases"
CONFIGS = (
    "zero0_bf16",
    "zero1_bf16",
    "zero2_bf16",
    "zero2_bf16_cpu_offload",
    "zero3_bf16",
    "zero3_bf16_cpu_offload",
)
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


IN_BF16 = ("two steps", "five steps", "clipped")
AT_ANY_SIZE = ("two steps", "rates", "clipped")


def cases_of(
    dtype: str, settings: Iterable[str], configs: tuple[str, ...] = CONFIGS
) -> dict[tuple[str, str], Any]:
    return {
        (shipped, name): {"shipped": shipped, "dtype": dtype, **SETTINGS[name]}
        for shipped in configs
        for name in settings
    }


OFFLOAD = tuple(shipped for shipped in CONFIGS if "offload" in shipped)
FP32 = cases_of("fp32", SETTINGS, tuple(c for c in CONFIGS if c not in OFFLOAD))
FP32 |= cases_of("fp32", AT_ANY_SIZE, OFFLOAD)
BF16 = cases_of("bf16", IN_BF16)
BYTES = [
    {"problem": "chain2", "shipped": shipped, "dtype": dtype, "num_steps": 3}
    for shipped in ("zero1_bf16", "zero2_bf16", "zero3_bf16")
    for dtype in ("fp32", "bf16")
]
TRACES: list[dict[str, Any]] = [
    {"problem": "chain3", "shipped": shipped, "dtype": dtype, "estimator": Unrolled(2)}
    for shipped in CONFIGS
    for dtype in ("fp32", "bf16")
] + [
    {"problem": "chain3", "shipped": "zero3_bf16", "dtype": "fp32", "estimator": estimator}
    for estimator in (
        Neumann(1, 0.1),
        ConjugateGradient(1),
        FiniteDifference(Unrolled(2), relative_step=1e-4),
    )
]
CYCLES = [
    {"problem": "chain3", "shipped": shipped, "dtype": "fp32", "num_steps": 2}
    for shipped in CONFIGS
]
AT_OTHER_SIZES = list(cases_of("fp32", AT_ANY_SIZE, ("zero2_bf16", "zero3_bf16")).values())
JOBS = {
    1: {"against_reference": AT_OTHER_SIZES, "shard_bytes": BYTES},
    2: {
        "against_reference": [*FP32.values(), *BF16.values()],
        "shard_bytes": BYTES,
        "leaves_no_trace": TRACES,
        "cycles_train": CYCLES,
    },
    4: {"against_reference": AT_OTHER_SIZES, "shard_bytes": BYTES},
}
# The first test waits for all processes.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results by number of ranks, then by rank and function."""
    return {
        n: run_ranks(
            f"{CASES}:several", n, tmp_path_factory.mktemp("ranks"), timeout=600, jobs=jobs
        )
        for n, jobs in JOBS.items()
    }


@pytest.fixture(scope="module")
def errors(runs: dict[int, Any]) -> dict[str, dict[tuple[str, str], Any]]:
    first, second = (rank["against_reference"] for rank in runs[2])
    assert first == second  # the hypergradient is the same on every rank
    return {
        "fp32": dict(zip(FP32, first[: len(FP32)], strict=True)),
        "bf16": dict(zip(BF16, first[len(FP32) :], strict=True)),
    }


@pytest.mark.parametrize(("shipped", "setting"), FP32)
def test_fp32_equals_the_reference(errors: dict[str, Any], shipped: str, setting: str) -> None:
    assert max(cycle["error"] for cycle in errors["fp32"][shipped, setting]) <= 1e-5


@pytest.mark.parametrize("setting", IN_BF16)
@pytest.mark.parametrize("shipped", CONFIGS)
def test_bf16_is_close(errors: dict[str, Any], shipped: str, setting: str) -> None:
    cycles = errors["bf16"][shipped, setting]
    assert statistics.median(cycle["error"] for cycle in cycles) <= 5e-2
    assert statistics.median(cycle["cosine"] for cycle in cycles) >= 0.999


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_other_numbers_of_ranks_equal_the_reference_too(
    runs: dict[int, Any], num_ranks: int
) -> None:
    # The reference sees the batches of all ranks as one, so N ranks equal one with N times as many.
    results = runs[num_ranks][0]["against_reference"]
    for case, cycles in zip(AT_OTHER_SIZES, results, strict=True):
        assert cycles[0]["error"] <= 1e-5, case


def test_records_and_vectors_shrink_with_the_ranks(runs: dict[int, Any]) -> None:
    for i, case in enumerate(BYTES):
        alone = runs[1][0]["shard_bytes"][i]
        # Each of 3 steps: weights in compute precision, and gradient and two moments in float32.
        per_weight = {"fp32": 4, "bf16": 2}[case["dtype"]] + 3 * 4
        assert alone["num_records"] == 3
        assert alone["records"] == pytest.approx(3 * per_weight * alone["numel"], rel=0.02)
        for n in (2, 4):
            for rank in runs[n]:
                for kind in ("records", "vector"):
                    # Shards are padded, by a few elements of each of these tiny parameters.
                    assert rank["shard_bytes"][i][kind] <= 1.15 * alone[kind] / n, (n, case, kind)


def test_no_estimator_leaves_a_trace(runs: dict[int, Any]) -> None:
    for rank in runs[2]:
        for case, (before, after) in zip(TRACES, rank["leaves_no_trace"], strict=True):
            assert after == before, case


def test_cycles_train_alike_on_every_stage(runs: dict[int, Any]) -> None:
    results = runs[2][0]["cycles_train"]
    first = {name: value.double() for name, value in results[0]["weights"].items()}
    for case, result in zip(CYCLES, results, strict=True):
        assert result["moved"] > 1e-6, case
        for losses, expected in zip(result["losses"], results[0]["losses"], strict=True):
            assert losses == pytest.approx(expected, rel=1e-4)
        assert relative_error(result["weights"], first) <= 1e-5, case
