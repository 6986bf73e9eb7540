"""The masked autoencoder: ViT encoder and decoder under the key names of the published weights."""

from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlomae.errors import UserError
from mlomae.models.attention import Attention
from mlomae.models.masking import Scorer
from mlomae.models.positions import sincos_positions
from mlomae.models.precision import at_least_float32


class Reconstruction(TypedDict):
    """What one masked forward pass yields (a plain dict, so DeepSpeed's hooks can walk it)."""

    patch_loss: Tensor  # [B, N], float32 or wider: mean squared error of every patch
    mask: Tensor  # [B, N]: 1 where the patch was hidden
    restore: Tensor  # [B, N]: each patch's place in the order of rising scores
    scores: Tensor  # [B, N]: as the scorer gave them
    embedding: Tensor  # [B, N, D], detached: what the scorer saw
    prediction: Tensor  # [B, N, patch_size**2 * in_chans]


class MaskedAutoencoder(nn.Module):
    """MAE with a pluggable choice of the hidden patches.

    Parameter names are those of the published MAE files. Positions are a buffer when fixed (MAE)
    and a parameter when trainable (MLO-MAE), under the same names. DeepSpeed keeps buffers in
    float32 beside bfloat16 parameters, so positions are cast where they are added.

    Args:
        image_size: height and width in pixels, or the side of a square.
        mask_ratio: share of the patches that a masked forward pass hides by default.
        norm_pix_loss: standardise each target patch by its mean and variance.
        trainable_positions: learn the positions, which start as 2-D sine-cosine tables.
        drop_path_rate: stochastic depth of the encoder's last block; earlier ones have less,
            linearly down to 0 at the first (Huang et al., arXiv 1603.09382).
        global_pool: features are the class token, or the mean of the patch tokens (`avg`).
        attention: one of `mlomae.models.attention.BACKENDS`.
        activation_checkpointing: recompute each block in the backward pass.
        compile_blocks: run each block through `torch.compile`.

    Raises:
        UserError: the patches do not divide the image, or a name is not known.

    Attributes:
        image_size, grid_size: (height, width) in pixels and (rows, columns) in patches.
        num_keep: visible patches at `mask_ratio`.

    Source: He et al., arXiv 2111.06377; mask selection by score: Guo et al., arXiv 2402.18128.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        trainable_positions: bool = False,
        drop_path_rate: float = 0.0,
        global_pool: Literal["token", "avg"] = "token",
        attention: str = "auto",
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(image_size, patch_size, global_pool)
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans, embed_dim)
        self.image_size: tuple[int, int] = self.patch_embed.img_size
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size
        self.num_patches = self.patch_embed.num_patches
        self.patch_size, self.in_chans = patch_size, in_chans
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.mask_ratio = mask_ratio
        self.num_keep = num_kept(self.num_patches, mask_ratio)
        self.norm_pix_loss = norm_pix_loss
        self.global_pool = global_pool
        self.activation_checkpointing = activation_checkpointing
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            attn_layer=Attention,
        )
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.blocks = nn.ModuleList(block(embed_dim, num_heads, drop_path=p) for p in drop_path)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        for name, dim in (("pos_embed", embed_dim), ("decoder_pos_embed", decoder_embed_dim)):
            table = torch.empty(1, 1 + self.num_patches, dim)
            if trainable_positions:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        self.init_weights()
        for layer in (*self.blocks, *self.decoder_blocks):
            layer.attn.backend = attention
            if compile_blocks:
                layer.compile()

    @torch.no_grad()
    def init_weights(self) -> None:
        """MAE's initial values; the patch projection's bias keeps the framework's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.copy_(sincos_positions(positions.shape[-1], self.grid_size))

    def forward(
        self,
        images: Tensor,
        scorer: Scorer | None = None,
        *,
        num_keep: int | None = None,
        coupled: bool = False,
        as_map: bool = False,
    ) -> Tensor | Reconstruction:
        """Masked reconstruction when there is a scorer, features of the whole image otherwise.

        All are reached through `forward`, because only this method runs the gathering hooks of
        a ZeRO-3 engine.

        Args:
            images: [B, in_chans, height, width], normalised.
            scorer: maps patch embeddings with positions [B, N, D] to scores [B, N]. The
                `N - num_keep` patches with the largest scores are hidden.
            num_keep: visible patches of each image; None for those of `mask_ratio`.
            coupled: give the scorer embeddings with their graph, instead of detached ones.
            as_map: without a scorer, keep the patch tokens apart instead of pooling.

        Returns:
            Without a scorer, pooled features after the final norm, [B, D], or as a map the patch
            tokens after it, where they lie in the image, [B, D, rows, columns].
            With one, a `Reconstruction`.
        """
        if scorer is None:
            tokens = self.forward_features(images)
            if as_map:
                return torch.unflatten(tokens[:, 1:].transpose(1, 2), 2, self.grid_size)
            return tokens[:, 0] if self.global_pool == "token" else tokens[:, 1:].mean(dim=1)

        embedding = self.embed(images)
        num_keep = self.num_keep if num_keep is None else num_keep
        scores = scorer(embedding if coupled else embedding.detach())
        # Selection is piecewise constant in the scores: no gradient passes through it. A learned
        # mask gets its gradient from the weights of the loss alone (arXiv 2402.18128, section 3).
        order = torch.argsort(scores.detach(), dim=1, stable=True)
        restore = torch.argsort(order, dim=1, stable=True)
        prediction = self._decode(self._encode(_take(embedding, order[:, :num_keep])), restore)
        return {
            "patch_loss": self._patch_loss(prediction, images),
            "mask": (restore >= num_keep).to(scores.dtype),
            "restore": restore,
            "scores": scores,
            "embedding": embedding.detach(),
            "prediction": prediction,
        }

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> projected patches with their positions [B, N, D], what a scorer sees."""
        patches: Tensor = self.patch_embed(images.to(self.cls_token.dtype))
        return patches + self.pos_embed[:, 1:].to(patches.dtype)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens of the whole image after the final norm, class token first."""
        return self._encode(self.embed(images))

    def _encode(self, tokens: Tensor) -> Tensor:
        """[B, K, D] embedded patches -> [B, 1 + K, D], class token first, after the final norm."""
        cls_token = self.cls_token + self.pos_embed[:, :1].to(tokens.dtype)
        tokens = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        normed: Tensor = self.norm(self._run(self.blocks, tokens))
        return normed

    def _decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """[B, 1 + K, D] and each patch's place in the order [B, N] -> predictions [B, N, P]."""
        tokens = self.decoder_embed(latent)
        num_hidden = restore.shape[1] + 1 - tokens.shape[1]
        mask_tokens = self.mask_token.expand(tokens.shape[0], num_hidden, -1)
        patches = _take(torch.cat([tokens[:, 1:], mask_tokens], dim=1), restore)
        positions = self.decoder_pos_embed.to(tokens.dtype)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + positions
        normed = self.decoder_norm(self._run(self.decoder_blocks, tokens))
        predictions: Tensor = self.decoder_pred(normed)[:, 1:]
        return predictions

    def _run(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        return tokens

    def _patch_loss(self, prediction: Tensor, images: Tensor) -> Tensor:
        target = self.patchify(at_least_float32(images))
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased, as published
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (at_least_float32(prediction) - target).square().mean(dim=-1)

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, patch_size**2 * C]; inside a patch: row, column, channel."""
        batch, channels, height, width = images.shape
        size = self.patch_size
        grid = images.reshape(batch, channels, height // size, size, width // size, size)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, self.num_patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Inverse of `patchify`, for any number of channels."""
        size, (rows, columns) = self.patch_size, self.grid_size
        grid = patches.reshape(patches.shape[0], rows, columns, size, size, -1)
        grid = grid.permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(grid.shape[0], -1, rows * size, columns * size)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens [B, N, D] at index [B, K] -> [B, K, D]."""
    return torch.gather(tokens, 1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _check_arguments(image_size: int | tuple[int, int], patch_size: int, global_pool: str) -> None:
    sides = (image_size,) if isinstance(image_size, int) else image_size
    if any(side % patch_size for side in sides):
        raise UserError(
            f"image_size is {image_size}, which patch_size {patch_size} does not divide: choose a "
            "multiple of it"
        )
    if global_pool not in ("token", "avg"):
        raise UserError(f"global_pool is {global_pool}: choose token or avg")


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of an image, floor(N (1 - mask_ratio)) as published."""
    return int(num_patches * (1 - mask_ratio))


def reconstruction_loss(patch_loss: Tensor, mask: Tensor) -> Tensor:
    """Mean loss of the hidden patches of the batch, the loss of plain MAE.

    Of patch losses that are weighted by their scores, this is equation 1 of arXiv 2402.18128 as its
    code averages it: the divisor counts hidden patches, and is not the sum of the weights.

    Args:
        patch_loss: [B, N].
        mask: [B, N], 1 where the patch is hidden.
    """
    return (patch_loss * mask).sum() / mask.sum()


class Masks(NamedTuple):
    """What a scorer decides for a batch."""

    scores: Tensor  # [B, N]: as the scorer gave them
    order: Tensor  # [B, N]: patches by rising score; the first num_keep stay visible
    mask: Tensor  # [B, N]: 1 where the patch is hidden


@torch.no_grad()
def choose_masks(
    model: "MaskedAutoencoder", images: Tensor, scorer: Scorer, num_keep: int | None = None
) -> Masks:
    """The masks of a batch, without running encoder or decoder.

    They are those of `model(images, scorer)`. For a plain module: under ZeRO-3 parameters are
    gathered in `forward` alone.

    Args:
        model: embeds the patches.
        images: [B, C, H, W], normalised.
        scorer: as the model's `forward` takes it.
        num_keep: visible patches of each image; None for the model's.
    """
    scores = scorer(model.embed(images))
    order = torch.argsort(scores, dim=1, stable=True)  # as the model breaks ties
    mask = torch.ones_like(scores)
    mask.scatter_(1, order[:, : model.num_keep if num_keep is None else num_keep], 0)
    return Masks(scores, order, mask)
