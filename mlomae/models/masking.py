"""The masking network of MLO-MAE: one score per patch, the highest are hidden."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.models.precision import at_least_float32


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


class _WideLinear(nn.Linear):
    """A linear map computed in float32 whatever its weights are.

    bfloat16 rounds close scores to ties, and a tie is broken by the patch's position. The weights
    are widened inside `forward`, because only there has ZeRO-3 gathered them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*(at_least_float32(t) for t in (input, self.weight, self.bias)))
