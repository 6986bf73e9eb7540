"""Layer-wise decay of the learning rate (Clark et al. 2020, arXiv 2003.10555; He et al. 2022)."""

from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from eval._finetune_recipe import FinetuneLevelRecipe

_POSITIONS_AND_TOKEN = ("pos_embed", "cls_token")


class _Layers:
    """What timm asks of a network: its parameters, and which layer each belongs to.

    As in MAE: patches, class token and positions come first, then each block. What has no pattern
    is the last layer: the head, and the final norm, which timm itself counts to the last block.
    """

    def __init__(self, vit: nn.Module) -> None:
        self.named_parameters = vit.named_parameters

    def group_matcher(self, coarse: bool) -> dict[str, str]:
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)"}


def layer_decay_groups(vit: nn.Module, recipe: FinetuneLevelRecipe) -> list[dict[str, Any]]:
    """Parameter groups, each with its `lr_scale` and `weight_decay`.

    The scale of layer g is decay^(L + 1 - g): 1 for head and final norm, decay for the last of the
    L blocks, decay^(L + 1) for the patch projection. Biases, norms, positions and class token do
    not decay, unless the recipe asks for it.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        _Layers(vit),
        weight_decay=recipe.weight_decay,
        weight_decay_exclude_1d=not recipe.decay_norm_and_bias,
        no_weight_decay_list=() if recipe.decay_norm_and_bias else _POSITIONS_AND_TOKEN,
        layer_decay=recipe.layer_decay,
    )
    return groups
