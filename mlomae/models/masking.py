"""Which patches are hidden: networks and baselines that score patches, the highest are hidden."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mlomae.models.attention import Attention
from mlomae.models.precision import at_least_float32

Scorer = Callable[[Tensor], Tensor]
"""Patch embeddings with positions [B, N, D] -> [B, N]; the patches with the largest are hidden."""


class MaskingNetwork(nn.Module):
    """Two-layer perceptron on the flattened patch embeddings of an image.

    Its first matrix has `num_patches * embed_dim * hidden_dim` weights (77 M for ViT-B/16, more
    than the encoder's blocks), so it is tied to one resolution and needs sharding as much as the
    ViT does.

    Source: Guo et al., arXiv 2402.18128, section 3.
    """

    def __init__(self, num_patches: int, embed_dim: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_patches * embed_dim, hidden_dim)
        self.fc2 = _WideLinear(hidden_dim, num_patches)

    def forward(self, embedding: Tensor) -> Tensor:
        """Scores in (0, 1), float32 or wider [B, N], from patches with positions [B, N, D]."""
        hidden = torch.relu(self.fc1(embedding.flatten(1)))
        return torch.sigmoid(self.fc2(hidden))


class LightMaskingNetwork(nn.Module):
    """One narrow transformer block over the patches of an image, then one score for each.

    All weights are shared over patches, so it works at any resolution and number of patches, and
    stays below 1 M parameters at every width of the encoder. Attention gives each score the
    context of the whole image; positions come with the embedding.

    Args:
        embed_dim: D of the patch embeddings.
        hidden_dim: width of the block, a multiple of its 4 heads.
        attention: one of `mlomae.models.attention.BACKENDS`.
    """

    NUM_HEADS = 4

    def __init__(self, embed_dim: int, hidden_dim: int = 128, attention: str = "auto") -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(embed_dim, eps=1e-6)
        self.embed = nn.Linear(embed_dim, hidden_dim)
        self.block = Block(
            hidden_dim,
            self.NUM_HEADS,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            attn_layer=Attention,
        )
        assert isinstance(self.block.attn, Attention)
        self.block.attn.backend = attention
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.score = _WideLinear(hidden_dim, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier as in the autoencoder; the small last layer starts scores near one half."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, embedding: Tensor) -> Tensor:
        """Scores in (0, 1), float32 or wider [B, N], from patches with positions [B, N, D]."""
        hidden = self.norm(self.block(self.embed(self.norm_in(embedding))))
        return torch.sigmoid(self.score(hidden).squeeze(-1))


class _WideLinear(nn.Linear):
    """A linear map computed in float32 whatever its weights are.

    bfloat16 rounds close scores to ties, and a tie is broken by the patch's position. The weights
    are widened inside `forward`, because only there has ZeRO-3 gathered them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*(at_least_float32(t) for t in (input, self.weight, self.bias)))


def random_scores(generator: torch.Generator) -> Scorer:
    """The scorer of plain MAE: uniform noise from a generator that the caller owns."""

    def scorer(embedding: Tensor) -> Tensor:
        return torch.rand(embedding.shape[:2], generator=generator, device=generator.device).to(
            embedding.device
        )

    return scorer


def block_scores(grid_size: tuple[int, int], num_hidden: int, generator: torch.Generator) -> Scorer:
    """Block-wise masking: rectangles of patches are hidden until there are `num_hidden`.

    Areas are uniform between 16 patches (fewer on grids below 14 x 14, in proportion) and what is
    still missing, aspect ratios log-uniform between 0.3 and its inverse. Every image must hide
    exactly `num_hidden` patches, so the rectangle that goes beyond loses patches of it at random.

    Source: Bao et al., arXiv 2106.08254, algorithm 1; its ratio's distribution follows its code.

    Args:
        grid_size: (rows, columns) of the patches.
        num_hidden: at most rows * columns.
        generator: owned by the caller.

    Returns:
        A scorer for embeddings of that grid; the `num_hidden` largest values are the hidden ones.
    """

    def scorer(embedding: Tensor) -> Tensor:
        draw = partial(torch.rand, generator=generator, device=generator.device)
        values = draw(len(embedding), *grid_size)  # order within a rectangle, and of the rest
        covered = torch.zeros_like(values, dtype=torch.bool)
        while bool((missing := num_hidden - covered.flatten(1).sum(1)).gt(0).any()):
            covered |= _rectangles(grid_size, missing, draw(4, len(embedding)))
            values += covered  # a patch is worth the more, the earlier it was covered
        return values.flatten(1).to(embedding.device)

    return scorer


def _rectangles(grid_size: tuple[int, int], missing: Tensor, noise: Tensor) -> Tensor:
    """One rectangle per image, bool [B, rows, columns], from uniform noise [4, B]."""
    rows, columns = grid_size
    smallest = min(16.0, 16 * rows * columns / 14**2)
    area = smallest + noise[0] * (missing - smallest).clamp(min=0)
    ratio = torch.exp((2 * noise[1] - 1) * math.log(1 / 0.3))
    height = (area * ratio).sqrt().round().clamp(1, rows)
    width = (area / ratio).sqrt().round().clamp(1, columns)
    top = (noise[2] * (rows - height + 1)).floor()
    left = (noise[3] * (columns - width + 1)).floor()
    return _interval(rows, top, height)[:, :, None] & _interval(columns, left, width)[:, None, :]


def _interval(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Whether each of `size` places lies in [start, start + length), bool [B, size]."""
    place = torch.arange(size, device=start.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])


def gumbel_keys(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Keys whose largest k are a random sample of k patches that favours high scores.

    Gumbel top-k: log(scores) + temperature * Gumbel noise. The sample is drawn without
    replacement, patch after patch, with probabilities proportional to scores**(1 / temperature)
    among those that are left; the order of the keys is the order of the draws. Temperature 0 gives
    the scores themselves, and so the deterministic top k. No gradient passes.

    Source: Kool et al., arXiv 1903.06059, section 2.

    Args:
        scores: not negative, [B, N].
        temperature: not negative.
        generator: owned by the caller.

    Returns:
        Finite keys [B, N], float32 or wider.
    """
    scores = at_least_float32(scores.detach())
    if temperature == 0:
        return scores
    noise = torch.empty(scores.shape, dtype=scores.dtype, device=generator.device)
    tiny = torch.finfo(scores.dtype).tiny  # log stays finite where a sigmoid has saturated
    gumbel = -noise.exponential_(generator=generator).clamp(min=tiny).log()
    return scores.clamp(min=tiny).log() + temperature * gumbel.to(scores.device)
