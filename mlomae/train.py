"""From a plan to a finished run: build engines and streams, train."""

import errno
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from data_ffcv import (
    Augmentation,
    DataError,
    Stream,
    open_eval_loader,
    open_stream,
)
from mlomae import checkpoint
from mlomae._ranks import report, set_up_logging, start_ranks
from mlomae.deepspeed_config import level_config
from mlomae.engines import NonFiniteError, TrainingLevel, build_level
from mlomae.errors import UserError
from mlomae.estimators import build_estimator
from mlomae.mae import BaselineReconstruction, Mae, baseline_scorer
from mlomae.masks import MaskSchedule
from mlomae.mlo_mae import LEVELS, CoupledReconstruction, FrozenReconstruction, MloMae
from mlomae.plan import Plan, is_continued, make_plan
from mlomae.randomness import hashed
from mlomae.recipe import Recipe, dump_recipe
from mlomae.trainer import Stopped, Trainer, count_cycles
from mlomae.weights import BUILDERS, RECIPE_FILE, load_initial_weights

logger = logging.getLogger(__name__)


def main(recipe: str, deepspeed_config: str, resume: bool, overrides: Sequence[str]) -> int:
    """Train as `launch/pretrain.py` was asked to, and return the exit code.

    0: finished. 1: the numbers broke down. 2: bad input, or an output_dir that cannot be written.
    128 + n: stopped by signal n, saved.
    """
    set_up_logging()
    try:
        plan = make_plan(recipe, deepspeed_config, resume, overrides)
        start_ranks()
        run(plan)
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
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def run(plan: Plan) -> None:
    """Build what was planned and train it. All ranks must call.

    Raises:
        Stopped, NonFiniteError: see `Trainer.run`.
        UserError: a checkpoint cannot be resumed.
    """
    recipe = plan.recipe
    dist.barrier()  # every rank has passed its checks before the first file is written
    if dist.get_rank() == 0:
        _write_resolved(plan)
    levels = build_levels(plan, count_cycles(recipe, plan.num_images))
    # After the engines: their weights are drawn alike on all ranks, dropout is not.
    torch.manual_seed(hashed(recipe.seed, dist.get_rank()))
    progress = None
    if plan.resume:
        progress = checkpoint.load(Path(recipe.output_dir) / "checkpoints", levels, recipe)
        if progress is None:
            logger.info("no checkpoint in %s yet: starting from scratch", recipe.output_dir)
    progress = progress or checkpoint.Progress()
    method = build_method(recipe, levels)

    with ExitStack() as stack:
        device = levels["pretrain"].engine.device
        streams = {
            name: stack.enter_context(_open_stream(plan, name, progress.cycle, device))
            for name in levels
        }
        pictures = _picture_images(plan, device)
        Trainer(recipe, method, levels, streams, plan.num_images, pictures, progress).run()


def build_levels(plan: Plan, num_cycles: int) -> dict[str, TrainingLevel]:
    """A DeepSpeed engine for each level of the recipe. All ranks must call."""
    recipe, levels = plan.recipe, {}
    for name, level in recipe.levels.items():
        module = BUILDERS[name](recipe)
        if name == "pretrain" and not is_continued(recipe, plan.resume):
            load_initial_weights(module, recipe)
        total_steps = num_cycles * level.steps_per_cycle
        levels[name] = build_level(
            name,
            module,
            level,
            level_config(
                plan.deepspeed_config,
                level,
                name,
                dist.get_world_size(),
                plan.recipe_name,
                plan.config_name,
            ),
            **coupling(recipe, name),
            total_steps=total_steps,
            warmup_steps=round(total_steps * level.warmup_epochs / recipe.epochs),
        )
    return levels


def coupling(recipe: Recipe, name: str) -> dict[str, Any]:
    """Loss of a level, and the levels which it reads."""
    if recipe.method == "mae":
        return {"loss": BaselineReconstruction(baseline_scorer(recipe))}
    if name != "pretrain":
        return LEVELS[name]
    frozen = recipe.masking.scores == "frozen"
    reconstruction = FrozenReconstruction if frozen else CoupledReconstruction
    return LEVELS[name] | {"loss": reconstruction(recipe.masking.weighting)}


def build_method(recipe: Recipe, levels: dict[str, TrainingLevel]) -> Mae | MloMae:
    """The recipe's method on its levels. All ranks must call.

    Raises:
        UserError: the recipe's estimator cannot work with these engines.
    """
    schedule = MaskSchedule.of(recipe, levels["pretrain"].total_steps)
    if recipe.method == "mae":
        return Mae(**levels, schedule=schedule)
    section = recipe.hypergradient
    try:
        return MloMae(
            **levels,
            estimator=build_estimator(section),
            keep_activations=section.keep_activations,
            schedule=schedule,
        )
    except ValueError as error:
        raise UserError(
            f"hypergradient.estimator {section.estimator} cannot be used: {error}"
        ) from None


def _open_stream(plan: Plan, name: str, cycle: int, device: torch.device) -> Stream:
    recipe, level = plan.recipe, plan.recipe.levels[name]
    return open_stream(
        recipe.data.train,
        augmentation=plan.augmentations[name],
        indices=plan.indices[name],
        batch_size=level.batch_size // dist.get_world_size(),
        seed=recipe.seed,
        name=name,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        mean=recipe.data.mean,
        std=recipe.data.std,
        start_batch=cycle * level.steps_per_cycle,
        num_workers=recipe.data.num_workers,
        backend=recipe.data.backend,
        device=device,
    )


def _picture_images(plan: Plan, device: torch.device) -> torch.Tensor:
    """The first images that no encoder step trains on, where there are some; not augmented."""
    recipe = plan.recipe
    candidates = plan.indices.get("mask")
    indices = np.arange(plan.num_images) if candidates is None else candidates
    size = recipe.model.image_size
    count = recipe.monitor.num_pictures
    loader = open_eval_loader(
        recipe.data.train,
        augmentation=Augmentation(kind="center_crop", image_size=size, resize=size),
        indices=indices[:count],
        batch_size=count,
        mean=recipe.data.mean,
        std=recipe.data.std,
        backend=recipe.data.backend,
        device=device,
    )
    return next(iter(loader))[0]


def _write_resolved(plan: Plan) -> None:
    resolved = dump_recipe(plan.recipe)
    Console(stderr=True, highlight=False).print(resolved, markup=False)
    folder = Path(plan.recipe.output_dir)
    (folder / RECIPE_FILE).write_text(resolved)
    (folder / "deepspeed_config.json").write_text(json.dumps(plan.deepspeed_config, indent=2))
