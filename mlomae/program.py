"""From a command line to a finished run: what every training program shares.

A program says what its recipe looks like, what has to fit before anything is built, and how its
task is built. The rest is here: flags, checks of the DeepSpeed JSON and of the output folder,
ranks, resuming, exit codes.
"""

import argparse
import errno
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from torch import nn

from data_ffcv import DataError, choose_backend
from mlomae import checkpoint
from mlomae._checkpoint_choice import choose
from mlomae._files import replace_text
from mlomae._output_dir import check_output_dir
from mlomae._ranks import (
    launched_world_size,
    report,
    report_lost_rank,
    set_up_logging,
    start_ranks,
)
from mlomae._rendezvous import COLLECTIVE_TIMEOUT
from mlomae._run_lock import release_all
from mlomae.deepspeed_config import (
    check_deepspeed_config,
    compute_dtype,
    level_config,
    load_deepspeed_config,
)
from mlomae.engines import NonFiniteError, TrainingLevel, build_level
from mlomae.errors import UserError
from mlomae.hypergrad.losses import Loss
from mlomae.models.attention import check_backend
from mlomae.randomness import hashed
from mlomae.recipe import RunRecipe, dump_recipe, load_recipe
from mlomae.report import SUMMARY_FILE
from mlomae.task import Task
from mlomae.trainer import Stopped, Trainer
from mlomae.watchdog import EX_TEMPFAIL, mark, watching
from mlomae.weights import RECIPE_FILE

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunRecipe)

# how gloo and NCCL say that the process at the other end has ended
_LOST_RANK = re.compile("(closed|reset) by peer|Broken pipe|remote process exited")


@dataclass(frozen=True)
class Job(Generic[R]):
    """What was asked for: a recipe, the DeepSpeed JSON, and how errors call the two."""

    recipe: R
    deepspeed_config: dict[str, Any]
    recipe_name: str
    config_name: str
    resume: bool = False

    @property
    def is_continued(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        folder = Path(self.recipe.output_dir) / "checkpoints"
        return self.resume and checkpoint.latest(folder) is not None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision of forward and backward passes."""
        return compute_dtype(self.deepspeed_config)

    def build_level(
        self,
        name: str,
        module: nn.Module,
        *,
        loss: Loss,
        num_cycles: int,
        lower: Sequence[str] = (),
        upper: Sequence[str] = (),
        param_groups: Sequence[dict[str, Any]] | None = None,
    ) -> TrainingLevel:
        """A level of the recipe on an engine of the JSON. All ranks must call.

        Args:
            num_cycles: of the whole run; sizes the schedule.
            loss, lower, upper, param_groups: as `mlomae.engines.build_level` has them.
        """
        level = self.recipe.levels[name]
        names = self.recipe_name, self.config_name
        config = level_config(self.deepspeed_config, level, name, dist.get_world_size(), *names)
        total_steps = num_cycles * level.steps_per_cycle
        return build_level(
            name,
            module,
            level,
            config,
            loss=loss,
            lower=lower,
            upper=upper,
            total_steps=total_steps,
            warmup_steps=round(total_steps * level.warmup_epochs / self.recipe.epochs),
            param_groups=param_groups,
        )


class Program(ABC, Generic[R]):
    """One kind of run.

    Attributes:
        schema: the recipes that it takes.
    """

    schema: type[R]

    @abstractmethod
    def module(self, recipe: R, name: str) -> nn.Module:
        """The untrained network of a level, drawn from the recipe's seed."""

    @abstractmethod
    def check(self, job: Job[R]) -> None:
        """Look at data and weights before anything is built; may keep what was read.

        Raises:
            UserError, DataError: one sentence on what is wrong and how to mend it.
        """

    @abstractmethod
    def build(self, job: Job[R]) -> Task:
        """The task on its engines. All ranks must call, after `check`."""


def run_program(program: Program[Any], description: str, argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks of a program, and return the exit code."""
    arguments, overrides = parse_arguments(description, argv)
    return launch(
        program, arguments.recipe, arguments.deepspeed_config, arguments.resume, overrides
    )


def parse_arguments(
    description: str,
    argv: Sequence[str] | None = None,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a training program, and the overrides of its recipe.

    Args:
        add: adds flags of the program's own.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a YAML file, or a shipped recipe's name")
    parser.add_argument("--deepspeed_config", required=True, help="a DeepSpeed JSON file")
    parser.add_argument(
        "--resume", action="store_true", help="continue from output_dir's newest checkpoint"
    )
    parser.add_argument(
        "--init_from",
        action="append",
        metavar="PATH",
        help="start from these weights; given twice for encoder and decoder in two files",
    )
    parser.add_argument(
        "--init_from_expected",
        action="append",
        metavar="NAME",
        help="a name, with * for any text, that may be missing from them or left over",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; unused")
    add(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    arguments = parser.parse_intermixed_args(argv)
    given = [
        f"{key}={json.dumps(values)}"
        for key in ("init_from", "init_from_expected")
        if (values := getattr(arguments, key))
    ]
    return arguments, given + arguments.overrides


def refuse_beside_evaluate(arguments: argparse.Namespace) -> None:
    """Refuse flags that only training heeds, beside a program's own `--evaluate`.

    Raises:
        UserError: names the flag.
    """
    for flag in ("resume", "init_from", "init_from_expected"):
        if getattr(arguments, flag):
            raise UserError(
                f"--{flag} is for training, and --evaluate says what is counted with: remove one"
            )


def launch(
    program: Program[Any],
    recipe: str,
    deepspeed_config: str,
    resume: bool,
    overrides: Sequence[str],
) -> int:
    """Check, train, and return the exit code of `exit_code`."""

    def work() -> None:
        job = make_job(program.schema, recipe, deepspeed_config, resume, overrides)
        check_job(program, job)
        start_ranks(COLLECTIVE_TIMEOUT)
        run_job(program, job)

    return exit_code(work)


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a rank, turn what ends it into a sentence and an exit code.

    0: finished. 1: the numbers broke down. 2: bad input, or an output_dir that cannot be written.
    75: another rank is gone, or hung. 128 + n: stopped by signal n, saved.
    """
    set_up_logging()
    try:
        work()
    except (UserError, DataError) as error:
        report(error)
        return 2
    except NonFiniteError as error:
        report(error)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        report(UserError(f"{error}: free some space below output_dir, and continue with --resume"))
        return 2
    except Stopped as stopped:
        logger.info("%s", stopped)
        return stopped.code
    except RuntimeError as error:
        if not _LOST_RANK.search(str(error)):
            raise
        report_lost_rank(error)
        return EX_TEMPFAIL
    finally:
        release_all()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def make_job(
    schema: type[R],
    recipe_name: str,
    config_name: str,
    resume: bool = False,
    overrides: Sequence[str] = (),
) -> Job[R]:
    """Read recipe and DeepSpeed JSON, and hold them against each other.

    Raises:
        UserError: one of them is wrong, or they contradict each other.
    """
    recipe = load_recipe(recipe_name, overrides, schema)
    config = load_deepspeed_config(config_name)
    check_deepspeed_config(config, recipe, launched_world_size(), recipe_name, config_name)
    return Job(recipe, config, recipe_name, config_name, resume)


def check_job(program: Program[R], job: Job[R]) -> None:
    """Everything that can be wrong with a job and be seen before ranks start.

    Raises:
        UserError, DataError: one sentence on what is wrong and how to mend it.
    """
    recipe = job.recipe
    choose_backend(recipe.data.backend, recipe.data.train)
    check_backend(
        recipe.model.attention,
        torch.device(get_accelerator().device_name()),
        job.compute_dtype,
        recipe.model.embed_dim // recipe.model.num_heads,
    )
    program.check(job)
    check_output_dir(recipe, job.resume, checkpoint_bytes(program, recipe))


def run_job(program: Program[R], job: Job[R]) -> None:
    """Build what was checked, and train it. All ranks must call.

    Raises:
        Stopped, NonFiniteError: see `Trainer.run`.
        UserError: a checkpoint cannot be resumed.
    """
    recipe, folder = job.recipe, Path(job.recipe.output_dir)
    with ExitStack() as stack:
        stack.enter_context(watching(recipe.monitor.hang_timeout))
        # Every rank has passed its checks before the first file is written.
        is_finished = [job.resume and (folder / SUMMARY_FILE).is_file()]
        dist.broadcast_object_list(is_finished)  # nodes may see a network's folder differently
        dist.barrier()
        if is_finished[0]:
            logger.info("%s is finished: nothing is left to do", folder)
            return
        if dist.get_rank() == 0:
            _write_resolved(job)
        newest = choose(folder / "checkpoints") if job.resume else None
        mark("building the engines")
        task = program.build(job)
        # After the engines: their weights are drawn alike on all ranks, dropout is not.
        torch.manual_seed(hashed(recipe.seed, dist.get_rank()))
        progress = checkpoint.Progress()
        if newest is not None:
            progress = checkpoint.load(newest, task, recipe)
        elif job.resume:
            logger.info("no checkpoint in %s yet: starting from scratch", folder)
        task.open(progress.cycle, stack)
        Trainer(recipe, task, progress).run()
    for level in task.levels.values():
        level.engine.destroy()  # else its hooks keep all its memory while a next run needs it


def checkpoint_bytes(program: Program[R], recipe: R) -> int:
    """About how large a checkpoint is: weights, fp32 masters and moments, and an fp32 export."""
    num_values = 0
    with torch.device("meta"):
        for name, level in recipe.levels.items():
            num_weights = sum(p.numel() for p in program.module(recipe, name).parameters())
            num_values += num_weights * (5 if level.optimizer == "adamw" else 4)
    return 4 * num_values


def _write_resolved(job: Job[Any]) -> None:
    resolved = dump_recipe(job.recipe)
    Console(stderr=True, highlight=False).print(resolved, markup=False)
    folder = Path(job.recipe.output_dir)
    (folder / "deepspeed_config.json").write_text(json.dumps(job.deepspeed_config, indent=2))
    replace_text(folder / RECIPE_FILE, resolved)  # --resume reads it
