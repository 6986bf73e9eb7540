"""The heads of the second and third level."""

from torch import Tensor, nn

from mlomae.models.precision import at_least_float32


class ClassificationHead(nn.Module):
    """LayerNorm, dropout and a linear map on the encoder's class token.

    Source: the public MLO-MAE code (arXiv 2402.18128); dropout 0.1 is its default.
    """

    def __init__(self, embed_dim: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, float32 or wider [B, num_classes], from class tokens [B, D]."""
        return at_least_float32(self.head(self.dropout(self.norm(features))))


class SegmentationHead(ClassificationHead):
    """The same on every patch token: the linear head of a plain ViT's feature map."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits, float32 or wider [B, num_classes, rows, columns], of a map [B, D, rows, columns].

        One row and column for each patch; pixels get theirs by resizing.
        """
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)
