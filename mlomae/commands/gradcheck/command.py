"""Check every hypergradient estimator against float64, on a user's recipe at reduced size.

    python -m mlomae gradcheck [--recipe R] [--deepspeed_config D] [key.subkey=value ...]

The truth is `hypergrad.reference`, which shares no code with what it checks.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from mlomae.commands.gradcheck.problem import LOWER, list_reductions, reduce_config, reduce_recipe
from mlomae.commands.gradcheck.rows import NUM_CYCLES, Bench, Cost, Row, make_rows
from mlomae.distributed.start import launched_world_size, report, set_up_logging, start_ranks
from mlomae.errors import UserError
from mlomae.pretraining.program import build_levels
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.randomness import derive_seed
from mlomae.recipe import load_recipe
from mlomae.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from mlomae.training.engines import NonFiniteError, TrainingLevel
from mlomae.training.program import Job

ENDLESS = 10**9  # cycles of the schedule, which therefore stays at its peak
BOUNDS = {  # largest relative error and smallest cosine, by what the models compute in
    torch.float64: (1e-10, 0.0),
    torch.float32: (1e-5, 0.0),
    torch.bfloat16: (5e-2, 0.999),
    torch.float16: (5e-2, 0.999),
}

NOTES = f"""\
*: the recipe's estimator.
Error (relative) and cosine: against an independent float64 reference that differentiates as many of
the newest steps of pretrain + classifier as `truth` says, from the engines' weights and moments,
with the patches and features that they hid. Medians of {NUM_CYCLES} cycles, which follow those for
the costs, because the derivative of the first AdamW steps is ill-conditioned.
Time and memory: of one hypergradient, where 1 is the forward and backward pass of one encoder step
({{unit}}). Memory includes what the steps recorded for it. At this size
overheads weigh more than in training."""


def main(recipe: str, deepspeed_config: str | None, overrides: Sequence[str]) -> int:
    """Print the table of all estimators, and return the exit code.

    0: the recipe's estimator is within the bounds. 1: it is not, or cannot be used. 2: bad input.
    """
    set_up_logging()
    logging.getLogger("mlomae.hypergrad.estimators").addFilter(_Once())
    try:
        config_name = deepspeed_config or _default_config()
        job, original = _job(recipe, config_name, overrides)
        _start()
        return run(job, original)
    except UserError as error:
        report(error)
        return 2
    except NonFiniteError as error:
        report(error)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(job: Job[PretrainingRecipe], original: PretrainingRecipe) -> int:
    """Measure and print. All ranks must call; rank 0 prints.

    Args:
        job: with the reduced recipe.
        original: the user's recipe.
    """
    console = Console(width=100, quiet=dist.get_rank() != 0, highlight=False, markup=False)
    levels = build_levels(job, ENDLESS)
    torch.manual_seed(
        derive_seed(job.recipe.seed, dist.get_rank())
    )  # dropout differs between ranks
    _print_header(console, job, original, levels["pretrain"])
    bench = Bench(job.recipe, levels)
    unit = bench.measure_unit()
    rows = make_rows(job.recipe)
    for row in rows:
        bench.measure_cost(row)
    bench.compare(rows)
    _print_table(console, rows, unit)
    (recipe_row,) = (row for row in rows if row.is_of_recipe)
    sentence, is_within = judge(recipe_row, levels["pretrain"].dtype)
    console.print(f"\n{sentence}")
    dist.barrier()  # a launcher kills rank 0 as soon as another one has ended
    return 0 if is_within else 1


def judge(row: Row, dtype: torch.dtype) -> tuple[str, bool]:
    """Whether the recipe's estimator is within the bounds of a precision, and the sentence."""
    start = f"The recipe's estimator, {row.name}, is"
    if row.reason:
        return f"{start} unusable here.", False
    error, cosine = BOUNDS[dtype]
    is_within = row.error <= error and row.cosine >= cosine
    wanted = f"relative error at most {error:g}" + (f", cosine at least {cosine}" if cosine else "")
    verdict = "within" if is_within else "not within"
    return f"{start} {verdict} the bounds of {_name(dtype)}: {wanted}.", is_within


def _job(
    name: str, config_name: str, overrides: Sequence[str]
) -> tuple[Job[PretrainingRecipe], PretrainingRecipe]:
    original = load_recipe(name, PretrainingRecipe, overrides)
    if original.method != "mlo_mae":
        raise UserError(
            f"recipe {name}: method {original.method} has no hypergradient to check: "
            "give a recipe of method mlo_mae"
        )
    recipe = reduce_recipe(original, launched_world_size())
    config = reduce_config(load_deepspeed_config(config_name), recipe)
    check_deepspeed_config(config, recipe, launched_world_size(), name, config_name)
    return Job(recipe, config, name, config_name), original


def _default_config() -> str:
    name = "zero2_bf16" if torch.cuda.is_available() else "cpu_zero2_fp32"
    return os.path.relpath(Path(__file__).parents[3] / "ds_configs" / f"{name}.json")


def _start() -> None:
    """Join the ranks of a launcher, or be the only one."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    start_ranks()


class _Once(logging.Filter):
    """Lets the first warning of each kind pass."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_new = record.msg not in self._seen
        self._seen.add(record.msg)
        return is_new


def _print_header(
    console: Console, job: Job[PretrainingRecipe], original: PretrainingRecipe, level: TrainingLevel
) -> None:
    stage = int(level.engine.zero_optimization_stage())
    num_ranks = dist.get_world_size()
    console.print(
        f"{job.recipe_name} with {job.config_name}: {_name(level.dtype)}, ZeRO stage "
        f"{stage}, {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}.\n"
        f"Reduced: {', '.join(list_reductions(original, job.recipe)) or 'nothing'}.\n"
        "DeepSpeed's buckets are no larger than the model, learning rates stay at their peak.\n"
        f"Images are random normal, labels random, of seed {job.recipe.seed}.\n"
    )


def _print_table(console: Console, rows: list[Row], unit: Cost) -> None:
    table = Table(box=MARKDOWN)
    for column in ("estimator", "truth", "error", "cosine", "time", "memory"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for row in rows:
        table.add_row(*_cells(row, unit))
    console.print(table)
    for row in rows:
        if row.reason:
            console.print(f"\n{row.name} is unusable here: {row.reason}.")
    unit_cost = f"{unit.seconds * 1e3:.1f} ms, {unit.bytes / 2**20:.2f} MiB on rank 0"
    console.print(f"\n{NOTES.format(unit=unit_cost)}")


def _cells(row: Row, unit: Cost) -> list[str]:
    name = f"*{row.name}" if row.is_of_recipe else row.name
    truth = " + ".join(str(row.steps[level]) for level in LOWER)
    if row.reason:
        return [name, truth, "unusable", "", "", ""]
    numbers = [f"{row.error:.1e}", f"{row.cosine:.5f}"]
    cost = row.cost
    return [
        *(name, truth, *numbers),
        *(f"{cost.seconds / unit.seconds:.1f}", f"{cost.bytes / unit.bytes:.1f}"),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
