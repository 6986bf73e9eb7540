"""Evaluation of a classifier that was fine-tuned before, here or elsewhere."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from eval.finetuning.network import build_classifier, load_classifier
from eval.finetuning.program import check_test
from eval.finetuning.recipe import FinetuneRecipe
from eval.finetuning.task import count
from mlomae.distributed.start import start_ranks
from mlomae.training.program import Job
from mlomae.training.report import write_result
from mlomae.training.result import RESULT_FILE

logger = logging.getLogger(__name__)

FOLDER = Path("eval") / "finetune"  # below output_dir


def evaluate_trained(job: Job[FinetuneRecipe], weights: str) -> None:
    """Write and log the accuracies of a classifier on the test images. All ranks must call.

    Args:
        weights: a run or a file, of a classifier as the recipe describes it.

    Raises:
        UserError, DataError: weights or images do not fit the recipe.
    """
    recipe = job.recipe
    vit, test = build_classifier(recipe), check_test(recipe)
    file = load_classifier(vit, recipe, weights)
    folder = recipe.output_dir / FOLDER
    start_ranks()
    device = torch.device(get_accelerator().current_device_name())
    measured = count(vit, recipe, test, device, job.compute_dtype)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        source = {"weights": str(file), "test": str(recipe.data.test)}
        write_result(folder, {"evaluation": "finetune", **source, **measured})
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in measured.items())
        logger.info("%s  (%s)", numbers, folder / RESULT_FILE)
