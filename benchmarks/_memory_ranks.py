"""Real cycles of a recipe on this rank: bytes of memory and bytes sent, case after case.

Started by `memory.py` on each rank, as _memory_ranks.py CASES RESULT.

Memory is what the C library has mapped: told to map every block of 64 KiB and more by itself, it
counts every tensor of that size exactly, those that an operator frees again included, on every
thread. The count is read after each operator; the C library's own maximum has what lies between,
but can only be read for the whole process.
"""

import ctypes
import gc
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None)
_FIELDS = [
    "arena",
    "ordblks",
    "smblks",
    "hblks",
    "hblkhd",
    "usmblks",
    "fsmblks",
    "uordblks",
    "fordblks",
    "keepcost",
]
_MAP_THRESHOLD, _SMALLEST = -3, 65536
_LIBC.mallopt(_MAP_THRESHOLD, _SMALLEST)  # before torch takes its first block

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mlomae.distributed.start import set_up_logging, start_ranks  # noqa: E402
from mlomae.pretraining.images import LevelImages  # noqa: E402
from mlomae.pretraining.program import build_levels, build_task  # noqa: E402
from mlomae.pretraining.recipe import PretrainingRecipe  # noqa: E402
from mlomae.pretraining.task import MloMaePretraining, Pretraining  # noqa: E402
from mlomae.training.program import Job  # noqa: E402

NUM_CYCLES = 2  # the first one makes the optimizers' states


class _MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


_LIBC.mallinfo2.restype = _MallocInfo


def mapped() -> int:
    """Bytes in mapped blocks of this process now."""
    return int(_LIBC.mallinfo2().hblkhd)


def most_mapped() -> int:
    """The most that there ever were, which the C library prints to stderr."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        _LIBC.malloc_stats()
        os.dup2(stderr, 2)
        file.seek(0)
        return int(re.findall(r"max mmap bytes\s*=\s*(\d+)", file.read().decode())[-1])


class Meter(TorchDispatchMode):
    """Peaks of mapped bytes by phase, and bytes handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.phase = "build"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and look."""
        result = func(*args, **(kwargs or {}))
        self.peaks[self.phase] = max(self.peaks[self.phase], mapped())
        if func.namespace == "c10d":
            self.sent[f"{self.phase}: {func.name()}"] += max(map(_nbytes, args), default=0)
        return result

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase."""
        self.phase, before = phase, self.phase
        yield
        self.phase = before


def measure(case: dict[str, Any], num_cycles: int = NUM_CYCLES) -> dict[str, Any]:
    """Bytes at rest, at the peak of each phase, and sent in each phase of a cycle."""
    gc.collect()
    before = mapped()
    recipe, meter = PretrainingRecipe.model_validate(case["recipe"]), Meter()
    with meter:
        levels = build_levels(Job(recipe, case["config"], "recipe", "config"), num_cycles=10**6)
        sizes = {name: LevelImages(None, range(10**6), None) for name in levels}  # type: ignore[arg-type]
        task = build_task(recipe, levels, sizes)
        for _ in range(num_cycles):
            gc.collect()
            at_rest = mapped() - before
            meter.sent.clear()
            _cycle(recipe, task, meter)
    peaks = {phase: peak - before for phase, peak in meter.peaks.items()}
    building, most = peaks.pop("build"), most_mapped() - before
    for level in levels.values():
        level.engine.destroy()
    return {
        "at rest": at_rest,
        "building": building,
        "peaks": peaks,
        "most ever": most,
        "sent": dict(meter.sent),
    }


def _small(case: dict[str, Any]) -> dict[str, Any]:
    recipe = case["recipe"]
    model = recipe["model"] | {"depth": 1, "decoder_depth": 1}
    return case | {"recipe": recipe | {"model": model}}


def _cycle(recipe: PretrainingRecipe, task: Pretraining, meter: Meter) -> None:
    """As the task's own, on random images."""
    for _ in range(recipe.pretrain.steps_per_cycle):
        images, _ = _draw(recipe, "pretrain")
        parts = images.chunk(recipe.pretrain.gradient_accumulation_steps)
        with meter.during("pretrain step"):
            task.pretrain_step([torch.cat([part]) for part in parts])
    if not isinstance(task, MloMaePretraining):
        return
    for _ in range(recipe.levels["classifier"].steps_per_cycle):
        batch = _draw(recipe, "classifier")
        with meter.during("classifier step"):
            task.problem.classifier_step(*batch)
    batch = _draw(recipe, "mask")
    with meter.during("mask step"):
        task.problem.mask_step(*batch)


def _draw(recipe: PretrainingRecipe, name: str) -> tuple[Tensor, Tensor]:
    number = recipe.levels[name].batch_size // dist.get_world_size()
    labels = torch.arange(number) % (recipe.data.num_classes or 1)
    return torch.randn(number, 3, *recipe.model.image_size), labels


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value)) if isinstance(value, (tuple, list)) else 0


def main() -> None:
    """Measure all cases; the first rank writes what it found."""
    cases, result = map(Path, sys.argv[1:])
    set_up_logging()
    start_ranks()
    wanted = json.loads(cases.read_text())
    measure(_small(wanted[0]), 1)  # loads what every case needs, which is not its own
    found = [measure(case) for case in wanted]
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
