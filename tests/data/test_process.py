"""What loading does to the process it runs in: nothing that stays."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.data.streams import draw, stream

RSS_OF = "int(open('/proc/self/statm').read().split()[1]) * 4096"
OPEN = (
    "open_stream({path!r}, augmentation=Augmentation('random_resized_crop', 16, flip=True),"
    " batch_size=40, seed=5, num_workers=2, backend={backend!r}, mean=[0.0] * 3, std=[1 / 255] * 3)"
)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_no_threading_layer_of_numba_is_started_and_a_forked_child_may_load(
    grey_beton: Path, backend: str
):
    """workqueue aborts with several loaders, OpenMP dies after a fork, TBB may hang at exit."""
    opened = OPEN.format(path=str(grey_beton), backend=backend)
    result = run_python(
        "import os, numba\nfrom data_ffcv import Augmentation, open_stream\n"
        f"parent = {opened}\nexpected = next(parent)[0]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        f"    with {opened} as own:\n"
        "        os._exit(0 if next(own)[0].equal(expected) else 3)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "next(parent)\n"
        "try:\n    print(numba.threading_layer())\n"
        "except ValueError:\n    print('none started')\n"
    )
    assert (result.returncode, result.stdout) == (0, "none started\n"), result.stderr


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_fifty_epochs_and_many_early_ends_leave_neither_memory_nor_threads(
    grey_beton: Path, backend: str
):
    """A ring of 150 kB leaked by every early end would show; the bound is what malloc keeps."""
    opened = OPEN.format(path=str(grey_beton), backend=backend)
    result = run_python(
        "import gc, threading\nfrom data_ffcv import Augmentation, open_stream\n"
        "def epochs(count):\n"
        f"    with {opened} as s:\n"
        "        for _ in range(5 * count): next(s)\n"
        "def early(count):\n"
        "    for _ in range(count):\n"
        f"        with {opened} as s: next(s)\n"
        f"def rss(): gc.collect(); return {RSS_OF}\n"
        "epochs(10); early(5); before = rss(), threading.active_count()\n"
        "epochs(50); early(30); after = rss(), threading.active_count()\n"
        "print(after[0] - before[0], after[1] - before[1])"
    )
    grown, threads = map(int, result.stdout.split())
    assert threads == 0 and grown < 8 << 20, result.stderr


def test_more_workers_than_cores_are_lowered(grey_beton: Path):
    cores = len(os.sched_getaffinity(0))
    before = threading.active_count()
    with stream(grey_beton, num_workers=cores + 100) as batches:
        next(batches)
        # the loading thread and at most one worker per core
        assert threading.active_count() - before <= cores + 1
    assert len(draw(grey_beton, 1, num_workers=cores + 1)) == 1
