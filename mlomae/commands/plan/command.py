"""What a run takes before it is paid for: `python -m mlomae plan`.

Memory, FLOPs and bytes sent come from a cycle of the recipe on tensors without memory
(`docs/scaling.md`); time comes from a utilisation and a bandwidth, which are assumptions.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_ffcv import DataError, inspect_images, split_by_class
from mlomae.commands.plan.advice import Plan, advise
from mlomae.commands.plan.cycle import Cycle
from mlomae.commands.plan.hardware import GB, find_gpu
from mlomae.commands.plan.speed import Cluster, Speed, expected_speed
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training.deepspeed_config import compute_dtype, load_deepspeed_config
from mlomae.training.task import count_cycles

RESERVE = 2 * GB  # CUDA's context, cuDNN, NCCL: not measured
FITS, BAD_INPUT, TOO_LARGE = 0, 2, 3


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asks for.

    Attributes:
        utilization: share of the GPU's peak FLOP/s.
        bandwidth: GB/s between nodes.
        num_images: of data.train; None to read it from the file.
    """

    recipe: str
    deepspeed_config: str
    nodes: int
    gpus_per_node: int
    gpu: str
    utilization: float
    bandwidth: float
    num_images: int | None
    overrides: Sequence[str]


def main(request: PlanRequest) -> int:
    """Print the plan. Returns 0 when it fits, 3 when not, 2 for bad input."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        plan = read_plan(request)
        cycle = plan.cycle()
        num_images = count_images(plan.recipe, request.num_images)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except ValueError as error:  # the estimator on these levels
        print(f"error: hypergradient of {request.recipe}: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    return _report(plan, cycle, num_images)


def read_plan(request: PlanRequest) -> Plan:
    """Read the recipe, the DeepSpeed JSON and the cluster from the request.

    Raises:
        UserError: one of them is wrong.
    """
    for flag in ("nodes", "gpus_per_node", "bandwidth", "num_images"):
        if (value := getattr(request, flag)) is not None and value <= 0:
            raise UserError(f"--{flag} is {value}: give a positive number")
    if not 0 < request.utilization <= 1:
        raise UserError(f"--utilization is {request.utilization}: give a share in (0, 1]")
    recipe = load_recipe(request.recipe, PretrainingRecipe, request.overrides)
    config = load_deepspeed_config(request.deepspeed_config)
    if config.get("data_types", {}).get("grad_accum_dtype") is not None:
        raise UserError(
            f"{request.deepspeed_config}: data_types.grad_accum_dtype is not planned: remove it"
        )
    gpu = find_gpu(request.gpu, compute_dtype(config))
    cluster = Cluster(
        gpu, request.nodes, request.gpus_per_node, request.utilization, request.bandwidth * GB
    )
    return Plan(recipe, config, cluster)


def count_images(recipe: PretrainingRecipe, num_images: int | None) -> int | None:
    """Images that the first level draws from; None when neither flag nor file says it.

    Args:
        num_images: in data.train, as the flag says it.

    Raises:
        DataError: the file is damaged.
    """
    is_split = recipe.method == "mlo_mae" and recipe.downstream is None
    if num_images is not None:
        num_held_out = round(num_images * recipe.data.mask_fraction) if is_split else 0
        return num_images - num_held_out
    if not Path(recipe.data.train).exists():
        return None
    info = inspect_images(recipe.data.train)
    if is_split and info.labels is not None:
        rest, _ = split_by_class(info.labels, recipe.data.mask_fraction, recipe.seed)
        return len(rest)
    return int(info.num_samples)


def _report(plan: Plan, cycle: Cycle, num_images: int | None) -> int:
    speed = expected_speed(plan.recipe, cycle, plan.cluster, compute_dtype(plan.config))
    budget = plan.cluster.gpu.memory - RESERVE
    peak = cycle.fullest.total
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # of a file: a line each, unbroken
    console.print(_memory_table(cycle, plan))
    console.print(_speed_table(plan, speed, num_images))
    if peak <= budget:
        console.print("It fits.")
        return FITS
    console.print("It does not fit. What would help, each line upon those before it:")
    steps = advise(plan, peak, budget)
    table = _table("change", "GB at most")
    for step in steps:
        table.add_row(step.text, f"{(step.peak + RESERVE) / GB:.1f}")
    console.print(table)
    if not steps or steps[-1].peak > budget:
        console.print("Nothing known here makes it fit: take larger GPUs or a smaller model.")
    return TOO_LARGE


def _memory_table(cycle: Cycle, plan: Plan) -> Table:
    """Parts of the fullest moment, and of the time between two cycles."""
    table = _table("memory of a GPU, GB", f"fullest: {cycle.fullest.phase}", "between cycles")
    rest = cycle.at_rest.parts
    for part in sorted({*cycle.fullest.parts, *rest}, key=lambda p: -cycle.fullest.parts.get(p, 0)):
        here, before = cycle.fullest.parts.get(part, 0), rest.get(part, 0)
        if here or before:
            table.add_row(part, _gigabytes(here), _gigabytes(before))
    table.add_row("CUDA and libraries (assumed)", _gigabytes(RESERVE), _gigabytes(RESERVE))
    sums = cycle.fullest.total + RESERVE, cycle.at_rest.total + RESERVE
    table.add_section()
    table.add_row("sum", *map(_gigabytes, sums))
    table.add_row("the GPU has", _gigabytes(plan.cluster.gpu.memory), "")
    for phase, moment in cycle.moments.items():
        table.add_row(f"fullest in {phase}", _gigabytes(moment.total + RESERVE), "")
    for part, num_bytes in cycle.host.items():
        table.add_row(f"host memory: {part}", "", _gigabytes(num_bytes))
    return table


def _speed_table(plan: Plan, speed: Speed, num_images: int | None) -> Table:
    """Rates, times, communication."""
    cluster, recipe = plan.cluster, plan.recipe
    table = _table("speed", "")
    flops = f"{100 * cluster.utilization:.0f} % of the peak FLOP/s (assumed)"
    table.add_row("a cycle computes", f"{speed.compute:.3f} s at {flops}")
    link = f"{cluster.link / GB:.0f} GB/s"
    table.add_row("a cycle communicates", f"{speed.communication:.3f} s at {link} (assumed)")
    share = f"{100 * speed.communication_share:.0f} % of the time when nothing overlaps"
    table.add_row("", share)
    for phase, moved in speed.moved.items():
        table.add_row(f"a GPU sends in {phase}", f"{moved / GB:.3f} GB a cycle")
    low, high = speed.images_per_second, speed.images_per_second_at_best
    table.add_row("images/s of pretrain", f"{low:.0f}, or {high:.0f} when all overlaps")
    table.add_row("a node's loaders must give", f"{speed.loader_rate:.0f} crops/s, all streams")
    if num_images is None:
        missing = f"{recipe.data.train} is not here: give --num_images"
        table.add_row("the whole schedule", missing)
        return table
    hours = count_cycles(recipe, num_images) * speed.seconds / 3600
    table.add_row(
        "the whole schedule", f"{hours:.1f} h, {hours * cluster.world_size:.0f} GPU-hours"
    )
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        right: Any = "right" if number and head else "left"
        table.add_column(head, justify=right, no_wrap=True)
    return table


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / GB:.2f}"
