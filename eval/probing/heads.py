"""What a linear probe trains, and what stands before it: linear heads behind one batch norm."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.probing.recipe import LEVEL, ProbeLevelRecipe
from mlomae.distributed.collectives import sum_over_ranks
from mlomae.hypergrad.losses import Models
from mlomae.models.batch_norm import BatchNorm
from mlomae.models.precision import at_least_float32


def feature_norm(num_features: int, eps: float) -> BatchNorm:
    """The batch norm behind a frozen encoder, without affine parameters.

    Heads that read the same features share it: without affine parameters it learns nothing, and
    norms of their own would hold the same statistics.

    Args:
        num_features: D.
        eps: added to the variance; 1e-6 in MAE's protocol, 1e-5 in MAE-CT's.
    """
    return BatchNorm(num_features, eps, affine=False, in_float64=True)


class LinearHeads(nn.Module):
    """Linear classifiers side by side, each of which is trained as if it were alone.

    Weights are drawn with standard deviation 0.01 (truncated at 2, which is out of reach), biases
    are zero.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int) -> None:
        super().__init__()
        heads = [nn.Linear(num_features, num_classes) for _ in range(num_heads)]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, float32 or wider [B, C, num_heads], from standardised features [B, D]."""
        features = features.to(next(self.parameters()).dtype)
        logits = [head(features) for head in self.heads]
        return at_least_float32(torch.stack(logits, dim=2))


def probe_loss(models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, mean over images and summed over heads: each gets the gradient of its loss.

    Args:
        models: `probe`, the heads.
        batch: standardised features [B, D] and labels [B].
    """
    features, labels = batch
    logits = models[LEVEL](features)
    targets = labels[:, None].expand(-1, logits.shape[2])
    return F.cross_entropy(logits, targets, reduction="none").mean(dim=0).sum()


def head_groups(heads: LinearHeads, recipe: ProbeLevelRecipe) -> list[dict[str, Any]]:
    """Parameter groups: the weights and the bias of each head, at its rate.

    LARS adapts the rate of the weights alone, and nothing but weights decays.
    """
    groups: list[dict[str, Any]] = []
    for head, rate in zip(heads.heads, recipe.base_lrs, strict=True):
        for param in head.parameters():
            is_weight = param.ndim > 1
            group = {"params": [param], "lr_scale": rate / max(recipe.base_lrs)}
            group["weight_decay"] = recipe.weight_decay if is_weight else 0.0
            if recipe.optimizer == "lars":
                group["always_adapt"] = is_weight
            groups.append(group)
    return groups


@torch.no_grad()
def head_accuracies(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, ...]],
    num_heads: int,
    device: torch.device,
) -> Tensor:
    """Accuracy of each head over the images of all ranks, float64 [num_heads] on the CPU.

    All ranks must call; one may have more batches than another.

    Args:
        logits_of: images [B, ...] -> logits [B, C, num_heads], without a collective in it.
        batches: images and labels [B] of this rank.
        device: of both.
    """
    counts = torch.zeros(num_heads + 1, dtype=torch.int64, device=device)  # the last: all images
    for images, labels in batches:
        counts[:-1] += (logits_of(images).argmax(dim=1) == labels[:, None]).sum(dim=0)
        counts[-1] += len(labels)
    counts = sum_over_ranks(counts).cpu()
    return counts[:-1].double() / counts[-1]
