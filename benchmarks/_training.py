"""The quickstart's cycles with real streams, and with one batch of each that stays in memory.

Started by `data_loading.py`, on each rank, as _training.py BETON RESULT NUM_BLOCKS NUM_CYCLES.
"""

import itertools
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from _about import HERE

from data_ffcv import inspect_beton
from mlomae.distributed.start import set_up_logging, start_ranks
from mlomae.pretraining import program as train
from mlomae.pretraining.task import Pretraining
from mlomae.training.program import make_job

ROOT = HERE.parent
_NUM_AHEAD = 4  # cycles: more than a stream's batches that are loaded ahead


class Memory:
    """A stream that gives one batch again and again."""

    def __init__(self, batch: tuple[torch.Tensor, ...]) -> None:
        self.batch = batch

    def __next__(self) -> tuple[torch.Tensor, ...]:
        return self.batch


def main() -> None:
    beton, result, num_blocks, num_cycles = sys.argv[1:]
    set_up_logging()
    start_ranks()
    with ExitStack() as stack:
        task = _build(beton, int(num_blocks) * int(num_cycles), stack)
        streams = task.streams
        memory = {name: Memory(next(stream)) for name, stream in streams.items()}
        found: dict[str, list[float]] = {"real": [], "synthetic": []}
        sources = {"real": streams, "synthetic": memory}
        for _, kind in itertools.product(range(int(num_blocks)), found):
            task.streams = sources[kind]
            found[kind].append(_seconds_per_cycle(task, int(num_cycles)))
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _build(beton: str, num_cycles: int, stack: ExitStack) -> Pretraining:
    """The quickstart's task, on another file."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    changes = {
        "output_dir": folder,
        "data.train": beton,
        "data.num_classes": inspect_beton(beton).num_classes,
    }
    program = train.PretrainingProgram()
    job = make_job(
        program.schema,
        str(ROOT / "launch" / "recipes" / "quickstart_mlo_mae.yaml"),
        str(ROOT / "ds_configs" / "cpu_zero2_fp32.json"),
        False,
        [f"{key}={value}" for key, value in changes.items()],
    )
    program.check(job)
    levels = train.build_levels(job, num_cycles)
    task = train.build_task(job.recipe, levels, program.images)
    task.open(0, stack)
    return task


def _seconds_per_cycle(task: Pretraining, num_cycles: int) -> float:
    for _ in range(_NUM_AHEAD):
        task.cycle()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_cycles):
        task.cycle()
    dist.barrier()
    return (time.perf_counter() - start) / num_cycles


if __name__ == "__main__":
    main()
