"""Train UperNet on a pretrained encoder for semantic segmentation, or evaluate one so trained.

    deepspeed eval/segment.py --recipe R.yaml --deepspeed_config D.json --init_from RUN_OR_FILE \\
        [--resume] [key.subkey=value ...]
    deepspeed eval/segment.py --recipe R.yaml --deepspeed_config D.json --evaluate RUN \\
        [key.subkey=value ...]

--init_from takes a run of this project, or weights of MAE, MAE-CT, timm or Hugging Face; without
it, training starts from random weights. --evaluate trains nothing: it counts on data.test with the
network of a run of this command, and writes output_dir/eval/segment/.

Images come with a mask each, in files that `python -m data_ffcv.convert segmentation` makes.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_ffcv import BetonInfo, choose_backend, inspect_images
from data_ffcv.inspect import count_pixels
from eval._layer_decay import layer_decay_groups
from eval._segmentation_metrics import IGNORED
from eval._segmentation_recipe import LEVEL, SegmentationRecipe
from eval._segmentation_task import (
    ENCODER,
    HEAD_FILE,
    SegmentationLoss,
    SegmentationTask,
    describe,
    draw,
    evaluate,
    join_weights,
    tagged,
    to_inference,
    train_augmentation,
)
from eval.features import check_class_names
from mlomae._ranks import start_ranks
from mlomae.errors import UserError
from mlomae.models.upernet import UperNet
from mlomae.pictures import save_picture
from mlomae.program import (
    Job,
    Program,
    exit_code,
    launch,
    make_job,
    parse_arguments,
    refuse_beside_evaluate,
)
from mlomae.report import write_result
from mlomae.task import count_cycles
from mlomae.vit import build_vit, check_encoder, load_encoder, warn_of_other_pixels
from mlomae.weights import MODEL_FILE, find_checkpoint

logger = logging.getLogger(__name__)

FOLDER = Path("eval") / "segment"  # below output_dir, of --evaluate


class Images(NamedTuple):
    """What a recipe's data section names."""

    train: BetonInfo
    test: BetonInfo


class SegmentationProgram(Program[SegmentationRecipe]):
    """Training of encoder, neck and heads.

    Attributes:
        images: once `check` has looked at them.
    """

    schema = SegmentationRecipe
    images: Images

    def module(self, recipe: SegmentationRecipe, name: str = LEVEL) -> UperNet:
        """The network as it is without weights to start from."""
        return build_network(recipe)

    def check(self, job: Job[SegmentationRecipe]) -> None:
        """Images and initial weights must fit the recipe."""
        self.images = check_images(job.recipe)
        recipe = job.recipe
        if recipe.init_from and not job.is_continued:
            check_encoder(recipe.model, recipe.init_from, recipe.init_from_expected)
            warn_of_other_pixels(recipe)

    def build(self, job: Job[SegmentationRecipe]) -> SegmentationTask:
        """The engine, filled with the initial weights."""
        recipe, own = job.recipe, job.recipe.segmentation
        network = build_network(recipe) if job.is_continued else initial_network(recipe)
        level = job.build_level(
            LEVEL,
            network,
            loss=SegmentationLoss(recipe.head.auxiliary_weight),
            num_cycles=count_cycles(recipe, self.images.train.num_samples),
            param_groups=layer_decay_groups(network, own, own.layer_decay, ENCODER),
        )
        return SegmentationTask(recipe, level, *self.images, lambda: build_network(recipe))


def build_network(recipe: SegmentationRecipe) -> UperNet:
    """An untrained network: MAE's initial values in the encoder, PyTorch's elsewhere."""
    own = recipe.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vit = build_vit(recipe.model, init_values=recipe.model.layer_scale, dynamic_img_size=True)
        return UperNet(
            vit,
            recipe.data.num_classes,
            preset=own.preset,
            channels=own.channels,
            auxiliary=own.auxiliary_weight > 0,
            dropout=own.dropout,
        )


def initial_network(recipe: SegmentationRecipe) -> UperNet:
    """The network that training starts from: untrained, but for the encoder of init_from.

    Raises:
        UserError: these weights do not fit.
    """
    network = build_network(recipe)
    if recipe.init_from:
        weights = recipe.init_from, recipe.init_from_expected
        load_encoder(network.backbone, recipe.model, *weights)
    return network


def check_images(recipe: SegmentationRecipe) -> Images:
    """The images of a recipe, if they fit it.

    Raises:
        UserError, DataError: they do not; names the key.
    """
    data, level = recipe.data, recipe.segmentation
    train, test = check_masks(recipe, "train"), check_masks(recipe, "test")
    check_class_names(train, test, f"data.train {data.train}", f"data.test {data.test}")
    if train.num_samples < level.batch_size:
        raise UserError(
            f"{LEVEL}.batch_size is {level.batch_size}, but {data.train} has {train.num_samples} "
            "images: lower it, or give more images"
        )
    choose_backend(data.backend, data.test)
    train_augmentation(recipe).check_fits(train)
    return Images(train, test)


def check_masks(recipe: SegmentationRecipe, key: str) -> BetonInfo:
    """The file of data.train or data.test, if it holds masks of as many classes as the recipe.

    Looks at 500 masks; the streams look at all.
    """
    path = getattr(recipe.data, key)
    info = inspect_images(path)
    if not isinstance(info, BetonInfo) or not info.has_masks:
        raise UserError(
            f"data.{key} {path} holds no masks: give a file of python -m data_ffcv.convert "
            "segmentation"
        )
    if info.num_classes != recipe.data.num_classes:
        raise UserError(
            f"data.num_classes is {recipe.data.num_classes}, but {path} has {info.num_classes} "
            f"classes: set data.num_classes={info.num_classes}, or convert with the right --classes"
        )
    _, num_pixels = count_pixels(info)
    if num_pixels[info.num_classes : IGNORED].any():
        largest = num_pixels[:IGNORED].nonzero()[0].max()
        raise UserError(
            f"data.{key} {path} has masks with the value {largest}, but {info.num_classes} classes "
            "(and 255 for none): convert it again with the right --classes or --ignore_index"
        )
    return info


# --- evaluation alone --------------------------------------------------------------------------


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
        logger.info("%s  (%s)", numbers, folder / "result.json")


def load_trained(network: UperNet, run: str) -> Path:
    """Fill a network from a run of this command; returns the checkpoint.

    Raises:
        UserError: there is none, or it is of another network.
    """
    checkpoint = find_checkpoint(run)
    try:
        given = join_weights(*(load_file(checkpoint / name) for name in (MODEL_FILE, HEAD_FILE)))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint} cannot be read ({reason}): give a run of eval/segment.py"
        ) from None
    shapes, own = ({n: tuple(t.shape) for n, t in w.items()} for w in (given, network.state_dict()))
    for name in own | shapes:
        if shapes.get(name) != own.get(name):
            raise UserError(
                f"{checkpoint} has {name} of shape {shapes.get(name)} and the recipe's network "
                f"{own.get(name)}: give the recipe's model, head and data the values of its run"
            )
    network.load_state_dict(given)
    return checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    arguments, overrides = parse_arguments(__doc__, argv, _add_evaluate)
    files = arguments.recipe, arguments.deepspeed_config
    if arguments.evaluate is None:
        return launch(SegmentationProgram(), *files, arguments.resume, overrides)

    def work() -> None:
        refuse_beside_evaluate(arguments)
        job = make_job(SegmentationRecipe, *files, overrides=overrides)
        evaluate_trained(job, arguments.evaluate)

    return exit_code(work)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        metavar="RUN",
        help="train nothing: count on data.test with the network of this run",
    )


if __name__ == "__main__":
    sys.exit(main())
