"""From a recipe to a finished run: check everything, build engines and streams, train."""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console

from data_ffcv import (
    Augmentation,
    DataError,
    Stream,
    inspect_beton,
    open_eval_loader,
    open_stream,
    split_by_class,
)
from mlomae import checkpoint
from mlomae._ranks import (
    launched_rank,
    launched_world_size,
    report,
    set_up_logging,
    start_ranks,
)
from mlomae.deepspeed_config import (
    check_deepspeed_config,
    compute_dtype,
    level_config,
    load_deepspeed_config,
)
from mlomae.engines import NonFiniteError, TrainingLevel, build_level
from mlomae.errors import UserError
from mlomae.estimators import build_estimator
from mlomae.foreign import check_weights
from mlomae.mae import BaselineReconstruction, Mae, baseline_scorer
from mlomae.masks import MaskSchedule
from mlomae.mlo_mae import LEVELS, CoupledReconstruction, FrozenReconstruction, MloMae
from mlomae.models.attention import check_backend
from mlomae.randomness import hashed
from mlomae.recipe import Recipe, dump_recipe, load_recipe
from mlomae.trainer import Stopped, Trainer, count_cycles
from mlomae.weights import (
    RECIPE_FILE,
    build_classifier,
    build_masking_network,
    build_model,
    load_initial_weights,
)

logger = logging.getLogger(__name__)

BUILDERS: dict[str, Callable[[Recipe], torch.nn.Module]] = {
    "pretrain": build_model,
    "classifier": build_classifier,
    "mask": build_masking_network,
}


@dataclass(frozen=True)
class Plan:
    """A run that passed every check which needs no engine.

    Attributes:
        indices: samples of each level's stream; None for all.
        num_images: images of the pretrain stream.
    """

    recipe: Recipe
    deepspeed_config: dict[str, Any]
    recipe_name: str
    config_name: str
    resume: bool
    indices: dict[str, np.ndarray | None]
    num_images: int


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


def make_plan(recipe_path: str, config_path: str, resume: bool, overrides: Sequence[str]) -> Plan:
    """Check recipe, DeepSpeed config, data and output folder, before anything is built.

    Raises:
        UserError, DataError: one sentence on what is wrong and how to mend it.
    """
    recipe = load_recipe(recipe_path, overrides)
    config = load_deepspeed_config(config_path)
    check_deepspeed_config(config, recipe, launched_world_size(), recipe_path, config_path)
    info = inspect_beton(recipe.data.train)
    indices: dict[str, np.ndarray | None] = {"pretrain": None}
    num_images = info.num_samples
    if recipe.method == "mlo_mae":
        if info.num_classes != recipe.data.num_classes:
            raise UserError(
                f"data.num_classes is {recipe.data.num_classes}, but {recipe.data.train} has "
                f"{info.num_classes} classes: set data.num_classes={info.num_classes}"
            )
        rest, part = split_by_class(info.labels, recipe.data.mask_fraction, recipe.seed)
        indices = {"pretrain": rest, "classifier": rest, "mask": part}
        num_images = len(rest)
    for name, level in recipe.levels.items():
        own = indices[name]
        count = num_images if own is None else len(own)
        if count < level.batch_size:
            raise UserError(
                f"{name}.batch_size is {level.batch_size}, but its stream has {count} images: "
                "lower it, or give more images"
            )
    _check_model(recipe, config, resume)
    _check_output_dir(recipe, resume)
    return Plan(recipe, config, recipe_path, config_path, resume, indices, num_images)


def _is_continued(recipe: Recipe, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from."""
    return resume and checkpoint.latest(Path(recipe.output_dir) / "checkpoints") is not None


def _check_model(recipe: Recipe, config: dict[str, Any], resume: bool) -> None:
    """Refuse an attention kernel that cannot run here, and initial weights that do not fit."""
    check_backend(
        recipe.model.attention,
        torch.device(get_accelerator().device_name()),
        compute_dtype(config),
        recipe.model.embed_dim // recipe.model.num_heads,
    )
    if recipe.init_from and not _is_continued(recipe, resume):
        with torch.device("meta"):
            model = build_model(recipe)
        check_weights(model, recipe.init_from, expected=recipe.init_from_expected)


def _check_output_dir(recipe: Recipe, resume: bool) -> None:
    folder = Path(recipe.output_dir)
    if not resume and any((folder / name).exists() for name in (RECIPE_FILE, "checkpoints")):
        raise UserError(
            f"output_dir {folder} holds another run: add --resume to continue it, or choose "
            "another output_dir"
        )
    probe = folder / f".write_test_{launched_rank()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written ({error.strerror}): choose another, or mend "
            "its rights or space"
        ) from None
    needed, free = checkpoint_bytes(recipe), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output_dir {folder} has {free / 2**30:.2f} GiB free, but a checkpoint takes about "
            f"{needed / 2**30:.2f} GiB: free some space, or choose another output_dir"
        )
    newest = checkpoint.latest(folder / "checkpoints") if resume else None
    if newest is not None:
        checkpoint.read_state(newest, recipe)
    elif (folder / RECIPE_FILE).exists():  # it ended before its first checkpoint
        checkpoint.refuse_other_recipe(folder, recipe)


def checkpoint_bytes(recipe: Recipe) -> int:
    """About how large a checkpoint is: weights, fp32 masters and moments, and an fp32 export."""
    num_values = 0
    with torch.device("meta"):
        for name, level in recipe.levels.items():
            num_weights = sum(p.numel() for p in BUILDERS[name](recipe).parameters())
            num_values += num_weights * (5 if level.optimizer == "adamw" else 4)
    return 4 * num_values


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
    modules = {name: BUILDERS[name](recipe) for name in recipe.levels}
    if not _is_continued(recipe, plan.resume):
        load_initial_weights(modules["pretrain"], recipe)
    for name, level in recipe.levels.items():
        total_steps = num_cycles * level.steps_per_cycle
        levels[name] = build_level(
            name,
            modules.pop(name),
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
        augmentation=Augmentation(
            image_size=recipe.model.image_size, **recipe.data.augmentation.model_dump()
        ),
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
        device=device,
    )
    return next(iter(loader))[0]


def _write_resolved(plan: Plan) -> None:
    resolved = dump_recipe(plan.recipe)
    Console(stderr=True, highlight=False).print(resolved, markup=False)
    folder = Path(plan.recipe.output_dir)
    (folder / RECIPE_FILE).write_text(resolved)
    (folder / "deepspeed_config.json").write_text(json.dumps(plan.deepspeed_config, indent=2))
