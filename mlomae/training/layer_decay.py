"""Layer-wise decay of the learning rate (Clark et al. 2020, arXiv 2003.10555; He et al. 2022)."""

import re
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from mlomae.recipe import LevelRecipe

_POSITIONS_AND_TOKEN = ("pos_embed", "cls_token")


class _Layers:
    """What timm asks of a network: its parameters, and which layer each belongs to.

    As in MAE: patches, class token and positions come first, then each block. What has no pattern
    is the last layer: heads, and the final norm, which timm itself counts to the last block.
    """

    def __init__(self, network: nn.Module, encoder: str) -> None:
        self.named_parameters = network.named_parameters
        self.encoder = re.escape(encoder)

    def group_matcher(self, coarse: bool) -> dict[str, str]:
        return {
            "stem": rf"^{self.encoder}(?:cls_token|pos_embed|patch_embed)",
            "blocks": rf"^{self.encoder}blocks\.(\d+)",
        }


def layer_decay_groups(
    network: nn.Module, recipe: LevelRecipe, layer_decay: float, encoder: str = ""
) -> list[dict[str, Any]]:
    """Parameter groups, each with its `lr_scale` and `weight_decay`.

    The scale of layer g is layer_decay^(L + 1 - g): 1 for heads and final norm, layer_decay for the
    last of the L blocks, layer_decay^(L + 1) for the patch projection. Biases, norms, positions and
    class token do not decay, unless the recipe asks for it.

    Args:
        encoder: what the names of the encoder's parameters begin with.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        _Layers(network, encoder),  # type: ignore[arg-type]  # it asks for no more
        weight_decay=recipe.weight_decay,
        weight_decay_exclude_1d=not recipe.decay_norm_and_bias,
        no_weight_decay_list=()
        if recipe.decay_norm_and_bias
        else [f"{encoder}{name}" for name in _POSITIONS_AND_TOKEN],
        layer_decay=layer_decay,
    )
    return groups
