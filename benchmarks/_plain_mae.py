"""MAE as one would write it in an evening: timm's blocks, PyTorch's AdamW, a loop."""

import mlomae  # noqa: F401  fixes torchvision's import, which timm's needs

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlomae.recipe import ModelRecipe

MASK_RATIO = 0.75


class PlainMae(nn.Module):
    """Mean loss of randomly hidden patches; positions are zero, which costs the same."""

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        width, decoder_width = recipe.embed_dim, recipe.decoder_embed_dim
        self.patch_size, num_patches = recipe.patch_size, recipe.num_patches
        self.num_keep = int(num_patches * (1 - MASK_RATIO))
        self.embed = PatchEmbed(recipe.image_size, recipe.patch_size, 3, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("positions", torch.zeros(num_patches, width))
        self.register_buffer("decoder_positions", torch.zeros(num_patches, decoder_width))
        self.encoder = nn.ModuleList(
            Block(width, recipe.num_heads, qkv_bias=True) for _ in range(recipe.depth)
        )
        self.norm, self.to_decoder = nn.LayerNorm(width), nn.Linear(width, decoder_width)
        self.decoder = nn.ModuleList(
            Block(decoder_width, recipe.decoder_num_heads, qkv_bias=True)
            for _ in range(recipe.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.predict = nn.Linear(decoder_width, 3 * recipe.patch_size**2)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss."""
        order = torch.rand(len(images), len(self.positions), device=images.device).argsort(1)
        kept, hidden = order[:, : self.num_keep], order[:, self.num_keep :]
        x = _rows(self.embed(images) + self.positions, kept)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.encoder:
            x = block(x)
        x = self.to_decoder(self.norm(x))
        # The order of the tokens is of no concern to attention: no need to shuffle back.
        patches = torch.cat([x[:, 1:], self.mask_token.expand(*hidden.shape, -1)], dim=1)
        x = torch.cat([x[:, :1], patches + self.decoder_positions[order]], dim=1)
        for block in self.decoder:
            x = block(x)
        prediction = self.predict(self.decoder_norm(x[:, 1 + self.num_keep :]))
        return F.mse_loss(prediction.float(), _rows(self._targets(images), hidden))

    def _targets(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size).flatten(2).mT
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


class PlainLoop:
    """Weights in float32; autocast where the other side computes in bfloat16."""

    def __init__(
        self, recipe: ModelRecipe, images: Tensor, dtype: torch.dtype, *, is_fused: bool
    ) -> None:
        self.images, self.dtype = images, dtype
        self.model: nn.Module = PlainMae(recipe).to(images.device)
        if recipe.compile_blocks:
            for block in (*self.model.encoder, *self.model.decoder):
                block.compile()
        if dist.get_world_size() > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=is_fused or None
        )

    def step(self) -> None:
        """One optimizer step."""
        is_half = self.dtype != torch.float32
        with torch.autocast(self.images.device.type, self.dtype, enabled=is_half):
            loss = self.model(self.images)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
