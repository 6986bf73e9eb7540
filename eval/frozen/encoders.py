"""The encoders that can be evaluated: of a run, or of other pretrained weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mlomae.checkpoint.folders import RECIPE_FILE, find_checkpoint
from mlomae.errors import UserError
from mlomae.foreign import PretrainedWeights, infer_architecture, load_weights, read_weights
from mlomae.foreign.layouts import to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.pretraining.networks import (
    build_model,
    for_inference,
    load_initial_weights,
    load_model,
)
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import read_values

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_WORKERS = 4  # loader threads for weights that come without a recipe
PRETRAINING = get_args(PretrainingRecipe.model_fields["method"].annotation)
"""Methods whose runs hold a masked autoencoder with its decoder."""


@dataclass(frozen=True)
class Encoder:
    """A model with what its images must be like.

    Attributes:
        name: the run's method, `untrained` (`initial` where training began with other weights), or
            the layout of other weights.
        source: what it was read from and how, as a result file says it.
        model: features come from its encoder; the decoder may be untrained.
        mean, std: of each channel, pixel values in [0, 1].
    """

    name: str
    source: dict[str, Any]
    model: MaskedAutoencoder
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_workers: int = NUM_WORKERS

    @cached_property
    def fingerprint(self) -> str:
        """Differs when a weight of the encoder does."""
        digest = hashlib.sha256()
        for name, tensor in sorted(to_timm(self.model.state_dict()).items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def of_run(run: str | Path, *, untrained: bool = False, with_decoder: bool = False) -> Encoder:
    """The encoder of a run of any kind or of a checkpoint folder; or as it was before training.

    Args:
        run: its folder, or one of its checkpoints.
        untrained: as the recipe's seed or its `init_from` gave it.
        with_decoder: the decoder must be there.

    Raises:
        UserError: nothing is there, or it is damaged; `untrained` for a run that did not pretrain.
    """
    checkpoint = find_checkpoint(run)
    if (method := read_values(checkpoint / RECIPE_FILE).get("method")) not in PRETRAINING:
        if untrained:
            raise UserError(f"--untrained is for pretraining, and {run} is a run of {method}")
        encoder = of_weights([checkpoint], with_decoder=with_decoder)
        return replace(encoder, source={"checkpoint": str(checkpoint), "untrained": False})
    model, recipe = load_model(run)
    name: str = recipe.method
    data = recipe.data
    if untrained:
        name = "initial" if recipe.init_from else "untrained"
        model = build_model(for_inference(recipe))
        _load_initial(model, recipe, run)
    source = {"checkpoint": str(checkpoint), "untrained": untrained}
    return Encoder(name, source, model, data.mean, data.std, data.num_workers)


def _load_initial(model: MaskedAutoencoder, recipe: PretrainingRecipe, run: str | Path) -> None:
    try:
        load_initial_weights(model, recipe)
    except UserError as error:
        raise UserError(f"what {run} was trained from (init_from): {error}") from None


def of_weights(
    paths: Sequence[str | Path],
    *,
    image_size: int | None = None,
    global_pool: Literal["token", "avg"] | None = None,
    num_heads: int | None = None,
    expected: Sequence[str] = (),
    with_decoder: bool = False,
) -> Encoder:
    """The encoder of other weights than a run's, in the architecture that their shapes give.

    Mean and standard deviation of the images are those of the file beside the weights, ImageNet's
    where there is none.

    Args:
        paths: files or folders as `mlomae.foreign` reads them.
        image_size: another than they were trained at; positions are interpolated.
        global_pool: `token` or `avg`; None for what the file beside the weights says, else `token`.
        num_heads: attention heads, where neither the width nor a file beside the weights says.
        expected: globs of names that may be missing or left over.
        with_decoder: read the decoder as well.

    Raises:
        UserError: they cannot be read, hold no encoder or not the decoder that is wanted, or do not
            fit the image size.
    """
    weights = _read_together(paths) if with_decoder else read_weights(paths[0])
    architecture = infer_architecture(weights, image_size=image_size, num_heads=num_heads)
    if architecture["in_chans"] != 3:
        raise UserError(
            f"{weights.file} is for images of {architecture['in_chans']} channels, and these have "
            "3: give other weights"
        )
    settings = {"global_pool": "token", "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | weights.config
    model = MaskedAutoencoder(**architecture, global_pool=global_pool or settings["global_pool"])
    load_weights(model, paths, expected=expected, parts="all" if with_decoder else "encoder")
    source = {
        "init_from": [str(path) for path in paths],
        "init_from_expected": list(expected),
        "image_size": model.image_size,
        "num_heads": model.num_heads,
        "global_pool": model.global_pool,
        "mean": settings["mean"],
        "std": settings["std"],
    }
    name = settings.get("method", weights.layout)
    return Encoder(name, source, model, settings["mean"], settings["std"])


def _read_together(paths: Sequence[str | Path]) -> PretrainedWeights:
    """The weights of all files, which must hold a decoder."""
    first, *others = [read_weights(path) for path in paths]
    for other in others:
        first.tensors |= other.tensors
        first.config = other.config | first.config
    if "decoder_embed.weight" not in first.tensors:
        raise UserError(
            f"{first.file} holds no decoder: give weights that have one, or its file with a second "
            "--init_from"
        )
    return first
