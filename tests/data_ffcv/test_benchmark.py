"""The benchmark of loading runs at its smallest size; its numbers are not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> dict:
    command = [sys.executable, ROOT / "benchmarks" / "data_loading.py", "--output", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    done = subprocess.run(
        [*map(str, command), *arguments], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = folder.glob("*-data-loading-cpu.json")
    (text,) = folder.glob("*-data-loading-cpu.md")
    assert text.read_text() in done.stdout
    return json.loads(result.read_text())


SIZES = ("--num_small", "160", "--sizes", "32", "--batch_size", "8", "--seconds", "0.05")


def test_streams_are_measured(tmp_path):
    parts = ["--rounds", "1", "--parts", "throughput"]
    results = run(tmp_path, *SIZES, "--libraries", "ours-threads", *parts)
    assert {one["num_streams"] for one in results["throughput"]} == {1, 3}
    assert all(len(one["rates"]) == 1 and min(one["rates"]) > 0 for one in results["throughput"])


@pytest.mark.slow
def test_contenders_take_turns(tmp_path):
    libraries = ["--libraries", "ours-threads", "dataloader"]
    parts = ["--rounds", "2", "--parts", "throughput", "conversion"]
    results = run(tmp_path, *SIZES, *libraries, *parts)
    names = {(one["library"], one["num_streams"]) for one in results["throughput"]}
    assert names == {(library, n) for library in libraries[1:] for n in (1, 3)}
    measured = results["throughput"] + results["conversion"]
    assert all(len(one["rates"]) == 2 and min(one["rates"]) > 0 for one in measured)
