"""The encoders that can be evaluated: of a run, or of anybody's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlomae.errors import UserError
from mlomae.foreign import infer_architecture, load_weights, read_weights
from mlomae.models import MaskedAutoencoder
from mlomae.recipe import Recipe
from mlomae.weights import (
    build_model,
    find_checkpoint,
    for_inference,
    load_initial_weights,
    load_model,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_WORKERS = 4  # loader threads for weights that come without a recipe


@dataclass(frozen=True)
class Encoder:
    """A model with what its images must be like.

    Attributes:
        name: the run's method, `untrained` (`initial` where training began with other weights), or
            the layout of foreign weights.
        source: what it was read from and how, as a result file says it.
        mean, std: of each channel, pixel values in [0, 1].
    """

    name: str
    source: dict[str, Any]
    model: MaskedAutoencoder
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_workers: int = NUM_WORKERS


def of_run(run: str | Path, *, untrained: bool = False) -> Encoder:
    """The encoder of a run or checkpoint folder; or as it was before training.

    Raises:
        UserError: nothing is there, or it is damaged.
    """
    model, recipe = load_model(run)
    name, data = recipe.method, recipe.data
    if untrained:
        name = "initial" if recipe.init_from else "untrained"
        model = build_model(for_inference(recipe))
        _load_initial(model, recipe, run)
    source = {"checkpoint": str(find_checkpoint(run)), "untrained": untrained}
    return Encoder(name, source, model, data.mean, data.std, data.num_workers)


def _load_initial(model: MaskedAutoencoder, recipe: Recipe, run: str | Path) -> None:
    try:
        load_initial_weights(model, recipe)
    except UserError as error:
        raise UserError(f"what {run} was trained from (init_from): {error}") from None


def of_weights(
    paths: Sequence[str | Path],
    *,
    image_size: int | None = None,
    global_pool: str | None = None,
    num_heads: int | None = None,
    expected: Sequence[str] = (),
) -> Encoder:
    """The encoder of anybody's weights, in the architecture that their shapes tell.

    Mean and standard deviation of the images are those of the file beside the weights, ImageNet's
    where there is none.

    Args:
        paths: files or folders as `mlomae.foreign` reads them.
        image_size: another than they were trained at; positions are interpolated.
        global_pool: `token` or `avg`; None for what the file beside the weights says, else `token`.
        num_heads: attention heads, where neither the width nor a file beside the weights tells.
        expected: globs of names that may be missing or left over.

    Raises:
        UserError: they cannot be read, hold no encoder, or do not fit the image size.
    """
    weights = read_weights(paths[0])
    architecture = infer_architecture(weights, image_size=image_size, num_heads=num_heads)
    if architecture["in_chans"] != 3:
        raise UserError(
            f"{weights.file} is for images of {architecture['in_chans']} channels, and these have "
            "3: give other weights"
        )
    told = {"global_pool": "token", "mean": IMAGENET_MEAN, "std": IMAGENET_STD} | weights.config
    model = MaskedAutoencoder(**architecture, global_pool=global_pool or told["global_pool"])
    load_weights(model, paths, expected=expected, parts="encoder")
    source = {
        "init_from": [str(path) for path in paths],
        "init_from_expected": list(expected),
        "image_size": model.image_size,
        "num_heads": model.num_heads,
        "global_pool": model.global_pool,
        "mean": told["mean"],
        "std": told["std"],
    }
    name = told.get("method", weights.layout)
    return Encoder(name, source, model, told["mean"], told["std"])
