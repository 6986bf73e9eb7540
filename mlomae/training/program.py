"""From a recipe to a finished run: what every training program shares.

A program says what its recipe looks like, what has to fit before anything is built, and how its
task is built. The rest is here: the job, checks of the DeepSpeed JSON and of the output folder,
resuming. Flags and exit codes are `command_line`'s.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from torch import nn

from data_ffcv import choose_backend
from mlomae import checkpoint
from mlomae.checkpoint.choice import choose
from mlomae.checkpoint.files import replace_text
from mlomae.checkpoint.folders import RECIPE_FILE
from mlomae.distributed.collectives import from_first_rank
from mlomae.distributed.start import launched_world_size
from mlomae.distributed.watchdog import mark, watching
from mlomae.hypergrad.losses import Loss
from mlomae.models.attention import check_backend
from mlomae.randomness import derive_seed
from mlomae.recipe import RunRecipe, dump_recipe, load_recipe
from mlomae.training.deepspeed_config import (
    check_deepspeed_config,
    compute_dtype,
    level_config,
    load_deepspeed_config,
)
from mlomae.training.engines import TrainingLevel, build_level
from mlomae.training.output_dir import check_output_dir
from mlomae.training.report import SUMMARY_FILE
from mlomae.training.task import Task
from mlomae.training.trainer import Trainer

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=RunRecipe)


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
            loss, lower, upper, param_groups: as `mlomae.training.engines.build_level` has them.
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
            UserError, DataError: one sentence on what is wrong and how to fix it.
        """

    @abstractmethod
    def build(self, job: Job[R]) -> Task:
        """The task on its engines. All ranks must call, after `check`."""


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
    recipe = load_recipe(recipe_name, schema, overrides)
    config = load_deepspeed_config(config_name)
    check_deepspeed_config(config, recipe, launched_world_size(), recipe_name, config_name)
    return Job(recipe, config, recipe_name, config_name, resume)


def check_job(program: Program[R], job: Job[R]) -> None:
    """Everything that can be wrong with a job and be seen before ranks start.

    Raises:
        UserError, DataError: one sentence on what is wrong and how to fix it.
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
        # Asked of the first rank only: nodes may see a network file system differently.
        is_finished = from_first_rank(job.resume and (folder / SUMMARY_FILE).is_file())
        dist.barrier()  # every rank has passed its checks before the first file is written
        if is_finished:
            logger.info("%s is finished: nothing is left to do", folder)
            return
        if dist.get_rank() == 0:
            _write_resolved(job)
        newest = choose(folder / "checkpoints") if job.resume else None
        mark("building the engines")
        task = program.build(job)
        # After the engines: their weights are drawn alike on all ranks, dropout is not.
        torch.manual_seed(derive_seed(recipe.seed, dist.get_rank()))
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
