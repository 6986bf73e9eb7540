"""Evaluation of a trained segmentation network."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from eval.segmentation.program import build_network, check_masks
from eval.segmentation.recipe import LEVEL, SegmentationRecipe
from eval.segmentation.task import (
    HEAD_FILE,
    describe,
    draw,
    evaluate,
    join_weights,
    tagged,
    to_inference,
)
from mlomae.checkpoint.folders import MODEL_FILE, find_checkpoint
from mlomae.distributed.start import start_ranks
from mlomae.errors import UserError
from mlomae.models.upernet import UperNet
from mlomae.training.monitor import save_picture
from mlomae.training.program import Job
from mlomae.training.report import write_result
from mlomae.training.result import RESULT_FILE

logger = logging.getLogger(__name__)

FOLDER = Path("eval") / "segment"  # below output_dir, of --evaluate


def evaluate_trained(job: Job[SegmentationRecipe], run: str) -> None:
    """Count with a network that this command trained before. All ranks must call.

    Raises:
        UserError, DataError: weights or images do not fit the recipe.
    """
    recipe = job.recipe
    test = check_masks(recipe, "test")
    network = build_network(recipe)
    checkpoint = load_trained(network, run)
    start_ranks()
    device = torch.device(get_accelerator().current_device_name())
    to_inference(network, device, job.compute_dtype)
    scores = evaluate(network, recipe, test, device, shows_progress=True)
    if dist.get_rank() == 0:
        folder = recipe.output_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw(network, recipe, test, device, recipe.monitor.num_pictures)
        save_picture(picture, str(folder / f"{LEVEL}.png"))
        source = {"evaluation": LEVEL, "weights": str(checkpoint)}
        write_result(folder, source | describe(recipe, test, scores) | tagged(scores))
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in tagged(scores).items())
        logger.info("%s  (%s)", numbers, folder / RESULT_FILE)


def load_trained(network: UperNet, run: str) -> Path:
    """Fill a network from a run of this command; returns the checkpoint.

    Raises:
        UserError: there is none, or it is of another network.
    """
    checkpoint = find_checkpoint(run)
    try:
        weights = join_weights(*(load_file(checkpoint / name) for name in (MODEL_FILE, HEAD_FILE)))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint} cannot be read ({reason}): give a run of eval/segment.py"
        ) from None
    shapes, needed = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (weights, network.state_dict())
    )
    for name in needed | shapes:
        if shapes.get(name) != needed.get(name):
            raise UserError(
                f"{checkpoint} has {name} of shape {shapes.get(name)} and the recipe's network "
                f"{needed.get(name)}: give the recipe's model, head and data the values of its run"
            )
    network.load_state_dict(weights)
    return checkpoint
