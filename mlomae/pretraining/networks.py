"""Weights in and out of a run: building the networks of a recipe, reading a trained encoder."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mlomae.checkpoint.folders import MASKING_FILE, MODEL_FILE, RECIPE_FILE, find_checkpoint
from mlomae.errors import UserError
from mlomae.foreign import load_weights
from mlomae.models import (
    ClassificationHead,
    LightMaskingNetwork,
    MaskedAutoencoder,
    MaskingNetwork,
    SegmentationHead,
)
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe


def build_model(recipe: PretrainingRecipe) -> MaskedAutoencoder:
    """An untrained masked autoencoder, initialised from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return MaskedAutoencoder(
            mask_ratio=recipe.masking.mask_ratio,
            **recipe.model.model_dump(exclude={"preset"}),
        )


def load_initial_weights(model: MaskedAutoencoder, recipe: PretrainingRecipe) -> None:
    """Give a new model the weights of the recipe's `init_from`, where it has one.

    Raises:
        UserError: they cannot be read, or do not fit; the model is unchanged.
    """
    if recipe.init_from:
        load_weights(model, recipe.init_from, expected=recipe.init_from_expected)


def build_masking_network(recipe: PretrainingRecipe) -> MaskingNetwork | LightMaskingNetwork:
    """An untrained masking network; the published one fits the recipe's patch grid alone."""
    model, hidden_dim = recipe.model, recipe.masking.hidden_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        if recipe.masking.network == "light":
            return LightMaskingNetwork(model.embed_dim, hidden_dim, model.attention)
        return MaskingNetwork(model.num_patches, model.embed_dim, hidden_dim)


def build_classifier(recipe: PretrainingRecipe) -> ClassificationHead:
    """An untrained head for the recipe's labels; the recipe must be one of `mlo_mae`."""
    assert recipe.classifier is not None
    labelled = recipe.labelled
    head = SegmentationHead if labelled.task == "segmentation" else ClassificationHead
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 2)
        return head(recipe.model.embed_dim, labelled.num_classes, recipe.classifier.dropout)


BUILDERS: dict[str, Callable[[PretrainingRecipe], nn.Module]] = {
    "pretrain": build_model,
    "classifier": build_classifier,
    "mask": build_masking_network,
}
"""The untrained network of each level."""


def load_model(path: str | Path) -> tuple[MaskedAutoencoder, PretrainingRecipe]:
    """The masked autoencoder of a run or checkpoint folder, in evaluation mode on the CPU.

    Raises:
        UserError: nothing is there, or the weights are not those of the recipe's model.
    """
    checkpoint = find_checkpoint(path)
    recipe = load_recipe(checkpoint / RECIPE_FILE, PretrainingRecipe)
    model = build_model(for_inference(recipe))
    _load_strictly(model, checkpoint / MODEL_FILE)
    return model.eval(), recipe


def load_masking_network(path: str | Path) -> MaskingNetwork | LightMaskingNetwork:
    """The masking network of an `mlo_mae` run or checkpoint folder, on the CPU."""
    checkpoint = find_checkpoint(path)
    network = build_masking_network(
        for_inference(load_recipe(checkpoint / RECIPE_FILE, PretrainingRecipe))
    )
    _load_strictly(network, checkpoint / MASKING_FILE)
    return network.eval()


def for_inference(recipe: PretrainingRecipe) -> PretrainingRecipe:
    """The recipe without what training alone needs, such as a kernel that only its GPUs have."""
    changes = {"attention": "auto", "compile_blocks": False, "activation_checkpointing": False}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def _load_strictly(module: torch.nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{file} does not hold the weights of the recipe beside it ({reason}): "
            "use another checkpoint"
        ) from None
