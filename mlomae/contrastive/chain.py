"""The three steps of MAE-CT, one after the other in the same processes."""

import argparse
import gc
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mlomae.contrastive.program import HeadProgram, TuneProgram
from mlomae.contrastive.recipe import STEPS, MaeCtRecipe
from mlomae.distributed.rendezvous import COLLECTIVE_TIMEOUT
from mlomae.distributed.start import launched_world_size, start_ranks
from mlomae.errors import UserError
from mlomae.pretraining.program import PretrainingProgram
from mlomae.recipe import load_recipe
from mlomae.training.command_line import exit_code, parse_arguments
from mlomae.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from mlomae.training.output_dir import refuse_other_recipe
from mlomae.training.program import Job, Program, check_job, run_job
from mlomae.training.report import SUMMARY_FILE

logger = logging.getLogger(__name__)

Jobs = dict[str, Job[Any]]


def run_chain(description: str, argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for, and return the exit code of `exit_code`."""

    def add_step(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--step", choices=STEPS, help="run this step alone, on what the others have left"
        )

    arguments, overrides = parse_arguments(description, argv, add_step)
    return launch_steps(
        arguments.recipe, arguments.deepspeed_config, arguments.resume, overrides, arguments.step
    )


def launch_steps(
    recipe: str,
    deepspeed_config: str,
    resume: bool,
    overrides: Sequence[str],
    step: str | None = None,
) -> int:
    """Check all steps, or one, run those that are not finished, and return the exit code."""

    def work() -> None:
        jobs = plan_steps(recipe, deepspeed_config, resume, overrides, step)
        for name, job in jobs.items():
            check_job(_program(name, awaited=jobs), job)
        start_ranks(COLLECTIVE_TIMEOUT)
        for name, job in jobs.items():
            gc.collect()  # the engines of the step before: cycles of references, and large
            program = _program(name)
            check_job(program, job)  # now with what the steps before it have left
            logger.info("step %s", name)
            run_job(program, job)

    return exit_code(work)


def plan_steps(
    recipe_name: str,
    config_name: str,
    resume: bool,
    overrides: Sequence[str],
    step: str | None = None,
) -> Jobs:
    """What is left to do, in order: the steps that are not finished.

    Raises:
        UserError: recipe and DeepSpeed config do not fit, a step was finished by another recipe, or
            what a lone step starts from is not there.
    """
    recipe: MaeCtRecipe = load_recipe(recipe_name, MaeCtRecipe, overrides)  # type: ignore[type-var]
    config = load_deepspeed_config(config_name)
    jobs = {}
    for name, run in recipe.runs().items():
        check_deepspeed_config(config, run, launched_world_size(), recipe_name, config_name)
        if not (run.output_dir / SUMMARY_FILE).is_file():
            jobs[name] = Job(run, config, recipe_name, config_name, resume)
            continue
        refuse_other_recipe(run.output_dir, run)
        logger.info("step %s is finished: %s", name, run.output_dir)
    return jobs if step is None else _alone(step, recipe, jobs)


def _alone(step: str, recipe: MaeCtRecipe, jobs: Jobs) -> Jobs:
    """The job of one step, whose predecessors have to be finished."""
    if step not in recipe.runs():
        key = {"pretrain": "init_from", "head": "head_from"}[step]
        raise UserError(
            f"--step {step}: {key} stands in for this step, remove the one or the other"
        )
    for earlier in _before(step, jobs):
        key = {"pretrain": "init_from", "head": "head_from"}[earlier]
        raise UserError(
            f"--step {step} needs the step {earlier}, but {jobs[earlier].recipe.output_dir} holds "
            f"no finished run: run that step first, or give weights in {key}"
        )
    return {step: jobs[step]} if step in jobs else {}


def _before(step: str, jobs: Jobs) -> Iterator[str]:
    return (name for name in STEPS[: STEPS.index(step)] if name in jobs)


def _program(name: str, awaited: Jobs | None = None) -> Program[Any]:
    """The program of a step; `awaited` are jobs of which the earlier ones will run before it."""
    if name == "pretrain":
        return PretrainingProgram()
    earlier = list(_before(name, awaited or {}))
    return (HeadProgram if name == "head" else TuneProgram)(awaited=earlier)
