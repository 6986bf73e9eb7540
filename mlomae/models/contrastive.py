"""The NNCLR head of MAE-CT, whose batch norms see the batch of all ranks."""

from typing import TypedDict

import torch
from torch import Tensor, nn

from mlomae.models.batch_norm import BatchNorm


class Embedded(TypedDict):
    """What the head makes of V views (a plain dict, so DeepSpeed's hooks can walk it)."""

    features: Tensor  # [V, B, D], detached: what the projector saw
    projections: Tensor  # [V, B, projection_dim]
    predictions: Tensor  # [V, B, projection_dim]


class NnclrHead(nn.Module):
    """Projector and predictor on pooled features of the encoder.

    Parameter names are those of the published MAE-CT head files. Each view passes by itself, so
    the statistics of the batch norms are those of one view over all ranks.

    Args:
        embed_dim: width of the encoder, D.
        projection_dim: width of projections and predictions.

    Source: Lehner et al., arXiv 2304.10520, after Dwibedi et al., arXiv 2104.14548.
    """

    def __init__(
        self,
        embed_dim: int,
        projector_hidden_dim: int = 2048,
        projection_dim: int = 256,
        predictor_hidden_dim: int = 4096,
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(embed_dim, projector_hidden_dim, bias=False),
            BatchNorm(projector_hidden_dim),
            nn.ReLU(),
            nn.Linear(projector_hidden_dim, projector_hidden_dim, bias=False),
            BatchNorm(projector_hidden_dim),
            nn.ReLU(),
            nn.Linear(projector_hidden_dim, projection_dim, bias=False),
            BatchNorm(projection_dim),
        )
        self.predictor = nn.Sequential(
            nn.Linear(projection_dim, predictor_hidden_dim, bias=False),
            BatchNorm(predictor_hidden_dim),
            nn.ReLU(),
            nn.Linear(predictor_hidden_dim, projection_dim, bias=False),
        )

    def forward(self, features: Tensor) -> Embedded:
        """Features [V, B, D] of V views. All ranks must call, with batches of one size."""
        features = features.to(next(self.projector.parameters()).dtype)
        projections = [self.projector(view) for view in features]
        return {
            "features": features.detach(),
            "projections": torch.stack(projections),
            "predictions": torch.stack([self.predictor(view) for view in projections]),
        }
