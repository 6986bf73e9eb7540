"""What loading does to the process it runs in: nothing that stays."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.data_ffcv.streams.draws import draw, stream

OPEN = """
import gc, os, threading
import numba
from data_ffcv import Augmentation, open_stream

def opened(backend):
    return open_stream(
        {path!r}, augmentation=Augmentation("random_resized_crop", 16, flip=True), batch_size=40,
        seed=5, num_workers=2, backend=backend, mean=[0.0] * 3, std=[1 / 255] * 3,
    )
"""
FORK = """
for backend in ("auto", "threads"):
    parent = opened(backend)
    expected = next(parent)[0]
    child = os.fork()
    if child == 0:
        with opened(backend) as batches:
            os._exit(0 if next(batches)[0].equal(expected) else 3)
    assert os.waitpid(child, 0)[1] == 0
    next(parent)
try:
    print(numba.threading_layer())
except ValueError:
    print("none started")
"""
GROWTH = """
def epochs(backend, count):
    with opened(backend) as stream:
        for _ in range(5 * count):
            next(stream)

def early(backend, count):
    for _ in range(count):
        with opened(backend) as stream:
            next(stream)

def footprint():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096, threading.active_count()

for backend in ("auto", "threads"):
    epochs(backend, 10)
    early(backend, 5)
before = footprint()
for backend in ("auto", "threads"):
    epochs(backend, 50)
    early(backend, 30)
after = footprint()
print(after[0] - before[0], after[1] - before[1])
"""


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OPEN.format(path=str(path)) + code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_no_threading_layer_of_numba_is_started_and_a_forked_child_may_load(grey_beton: Path):
    """workqueue aborts with several loaders, OpenMP dies after a fork, TBB may hang at exit."""
    result = run_python(FORK, grey_beton)
    assert (result.returncode, result.stdout) == (0, "none started\n"), result.stderr


def test_fifty_epochs_and_many_early_ends_leave_neither_memory_nor_threads(grey_beton: Path):
    """A batch of 120 kB leaked by every early end would show; the bound is what malloc keeps."""
    result = run_python(GROWTH, grey_beton)
    grown, threads = map(int, result.stdout.split())
    assert threads == 0 and grown < 6 << 20, result.stderr


def test_more_workers_than_cores_are_lowered(grey_beton: Path):
    cores = len(os.sched_getaffinity(0))
    before = threading.active_count()
    with stream(grey_beton, num_workers=cores + 100) as batches:
        next(batches)
        # the loading thread and at most one worker per core
        assert threading.active_count() - before <= cores + 1
    assert len(draw(grey_beton, 1, num_workers=cores + 1)) == 1
