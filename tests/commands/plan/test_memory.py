"""The plan against bytes that real processes hold and send, at every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SMALL = ("--depth", "2", "--image_size", "96", "--batch_size", "4", "--together")


def run(folder: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--output", folder, *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (result,) = folder.glob("*-memory-cpu.json")
    return json.loads(result.read_text())


def check(results: list[dict]) -> None:
    for result in results:
        planned, measured = result["planned"], result["measured"]
        assert planned["at rest"] == pytest.approx(measured["at rest"], rel=0.02), result["case"]
        for phase, peak in measured["peaks"].items():
            assert planned["peaks"][phase] == pytest.approx(peak, rel=0.1), (result["case"], phase)
        sent = sum(measured["sent"].values())
        assert sum(planned["sent"].values()) == pytest.approx(sent, rel=0.1), result["case"]


def test_the_plan_is_right_within_a_tenth_at_every_stage(tmp_path):
    results = run(tmp_path, *SMALL, "--methods", "mlo_mae", "--precisions", "fp32")
    assert len(results) == 4
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_accumulation_and_overlap(tmp_path, precision):
    more = ("--gradient_accumulation_steps", "2", "--overlap", "--precisions", precision)
    check(run(tmp_path, *SMALL, *more))


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    check(run(tmp_path, *SMALL, "--methods", "mlo_mae", "--num_ranks", "4", "--precisions", "bf16"))
