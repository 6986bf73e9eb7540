"""The classifier that is fine-tuned: untrained, started from an encoder, or read back whole."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from eval.finetuning.recipe import FinetuneRecipe
from mlomae.errors import UserError
from mlomae.foreign import read_weights
from mlomae.training.vit import build_vit, check_encoder, load_encoder, warn_of_other_pixels

HEAD_STD = 2e-5  # of the head's initial weights, as in MAE's fine-tuning
_OF_HEAD = ("fc_norm.", "head.")


def build_classifier(recipe: FinetuneRecipe) -> VisionTransformer:
    """An untrained classifier: MAE's initial values, and next to nothing in the head.

    With global_pool avg the mean of the patch tokens goes through a norm of its own (`fc_norm`) and
    the final norm is left out; with token the class token has passed the final norm.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vit = build_vit(
            recipe.model,
            num_classes=recipe.data.num_classes,
            drop_rate=recipe.finetune.dropout,
        )
        assert isinstance(vit.head, nn.Linear)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
    return vit


def check_start(recipe: FinetuneRecipe) -> None:
    """Raise as `start` would."""
    if recipe.init_from:
        check_encoder(recipe.model, recipe.init_from, _expected(recipe))
        warn_of_other_pixels(recipe)


def start(vit: VisionTransformer, recipe: FinetuneRecipe) -> None:
    """Give an untrained classifier the encoder of `init_from`, where there is one.

    A head that its file holds is left out, for it tells other classes apart.

    Raises:
        UserError: the weights cannot be read, or do not fit.
    """
    if recipe.init_from:
        load_encoder(vit, recipe.model, recipe.init_from, _expected(recipe))


def load_classifier(vit: VisionTransformer, recipe: FinetuneRecipe, path: str | Path) -> Path:
    """Fill encoder and head from a fine-tuned run or file, and return the file that was read.

    Raises:
        UserError: it holds no such encoder, or no head for these classes.
    """
    needed = {name: t for name, t in vit.state_dict().items() if name.startswith(_OF_HEAD)}
    theirs = read_weights(path, num_patches=vit.patch_embed.num_patches)
    for name, tensor in needed.items():
        if name not in theirs.tensors:
            raise UserError(
                f"{theirs.file} holds no {name}: give a classifier that was fine-tuned with "
                f"model.global_pool {recipe.model.global_pool}"
            )
        if (shape := theirs.tensors[name].shape) != tensor.shape:
            raise UserError(
                f"{theirs.file} has {name} of shape {[*shape]}, and the recipe's is "
                f"{[*tensor.shape]}: set data.num_classes and model to what it was trained with"
            )
    load_encoder(vit, recipe.model, [path], _expected(recipe))
    vit.load_state_dict({name: theirs.tensors[name] for name in needed}, strict=False)
    return theirs.file


def _expected(recipe: FinetuneRecipe) -> tuple[str, ...]:
    """Names that may be missing or left over: those of heads, and of a norm that nothing uses."""
    unused = ("norm.*",) if recipe.model.global_pool == "avg" else ()
    return (*recipe.init_from_expected, *(f"{name}*" for name in _OF_HEAD), *unused)
