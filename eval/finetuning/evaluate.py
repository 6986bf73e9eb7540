"""Counting with a classifier that was fine-tuned before, here or elsewhere."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from data_ffcv import ImagesInfo
from eval.finetuning.network import load_classifier
from eval.finetuning.recipe import FinetuneRecipe
from eval.finetuning.task import count
from mlomae.distributed.start import start_ranks
from mlomae.training.program import Job
from mlomae.training.report import write_result

logger = logging.getLogger(__name__)

FOLDER = Path("eval") / "finetune"  # below output_dir


def evaluate(job: Job[FinetuneRecipe], vit: nn.Module, weights: str, test: ImagesInfo) -> None:
    """Write and log the accuracies of a classifier on the test images. All ranks must call.

    Args:
        vit: as the recipe describes it.
        weights: what fills it, a run or a file.

    Raises:
        UserError: the weights cannot be read, or are not those of such a classifier.
    """
    recipe = job.recipe
    file = load_classifier(vit, recipe, weights)
    folder = recipe.output_dir / FOLDER
    start_ranks()
    device = torch.device(get_accelerator().current_device_name())
    found = count(vit, recipe, test, device, job.compute_dtype)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        source = {"weights": str(file), "test": str(recipe.data.test)}
        write_result(folder, {"evaluation": "finetune", **source, **found})
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in found.items())
        logger.info("%s  (%s)", numbers, folder / "result.json")
