"""A ViT cut into the part that stays as it is and the part that is tuned."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlomae.contrastive.recipe import TuneRecipe
from mlomae.models.contrastive import Embedded, NnclrHead


class LowerEncoder(nn.Module):
    """Patch projection, class token, positions and the lowest blocks, none of which is trained.

    The ViT's modules, under its names.
    """

    def __init__(self, vit: VisionTransformer, num_blocks: int) -> None:
        super().__init__()
        assert vit.cls_token is not None and vit.pos_embed is not None
        self.patch_embed = vit.patch_embed
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.blocks = nn.Sequential(*list(vit.blocks)[:num_blocks])
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, 1 + N, D], class token first."""
        patches = self.patch_embed(images.to(self.cls_token.dtype))
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        tokens: Tensor = self.blocks(torch.cat([cls_token, patches], dim=1) + self.pos_embed)
        return tokens

    def train(self, mode: bool = True) -> "LowerEncoder":
        """Nothing: it never trains."""
        return super().train(False)


class UpperEncoder(nn.Module):
    """The other blocks, final norm and pooling.

    The ViT's modules, under its names: block i is `blocks.i` here, too.
    """

    def __init__(self, vit: VisionTransformer, num_lower_blocks: int) -> None:
        super().__init__()
        blocks = enumerate(vit.blocks)
        self.blocks = nn.ModuleDict({str(i): b for i, b in blocks if i >= num_lower_blocks})
        self.norm = vit.norm
        self.global_pool = vit.global_pool
        self.activation_checkpointing = vit.grad_checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1 + N, D] -> pooled features [B, D]."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks.values():
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        tokens = self.norm(tokens)
        return tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(dim=1)


class FrozenEncoder(nn.Module):
    """Both parts, none of which is trained."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.lower = LowerEncoder(vit, len(vit.blocks))
        self.upper = UpperEncoder(vit, len(vit.blocks))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> pooled features [B, D]."""
        features: Tensor = self.upper(self.lower(images))
        return features


class TunedEncoder(nn.Module):
    """What the third step trains: the upper part of the encoder, and the head on it."""

    def __init__(self, encoder: UpperEncoder, head: NnclrHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, tokens: Tensor) -> Embedded:
        """Tokens [V, B, 1 + N, D] of V views. All ranks must call, with batches of one size."""
        features = self.encoder(tokens.flatten(0, 1))
        embedded: Embedded = self.head(features.unflatten(0, tokens.shape[:2]))
        return embedded


def tuned_param_groups(
    module: TunedEncoder, depth: int, recipe: TuneRecipe
) -> list[dict[str, Any]]:
    """The optimizer's groups, whose rates are multiples of the schedule's.

    Block i of L has layer_decay^(L - i) of the encoder's rate, counted over the whole depth; final
    norm and head have no such factor. (timm's own groups give the final norm that of the last
    block.) 1-D weights do not decay.

    Args:
        depth: blocks of the whole encoder, L.
    """
    encoder, head = module.encoder, module.head
    parts = [(encoder.norm, 1.0, recipe.weight_decay)]
    for number, block in encoder.blocks.items():
        scale = recipe.layer_decay ** (depth - int(number))
        parts.append((block, scale, recipe.weight_decay))
    parts.append((head, recipe.head_lr / recipe.lr, recipe.head_weight_decay))
    return [
        {**group, "lr_scale": scale}
        for part, scale, decay in parts
        for group in param_groups_weight_decay(part, decay)
        if group["params"]
    ]
