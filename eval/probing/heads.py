"""What a linear probe trains, and what stands before it: linear heads behind one batch norm."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eval.probing.recipe import ProbeLevelRecipe
from mlomae.hypergrad.losses import Models
from mlomae.models.precision import at_least_float32

_MOMENTUM = 0.1  # weight of the latest batch in the running statistics, PyTorch's default


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm without affine parameters, by the statistics of the batches of all ranks.

    It stands behind a frozen encoder, so no gradient flows through it and a sum over ranks does.
    Heads that read the same features share it: without affine parameters it learns nothing, and
    their own ones would hold the same statistics. As in `BatchNorm1d`, the running variance is the
    unbiased one and the batch is divided by the biased one. A batch that is not finite leaves the
    running statistics alone.

    Args:
        num_features: D.
        eps: added to the variance; 1e-6 in MAE's protocol, 1e-5 in MAE-CT's.
    """

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__(num_features, eps=eps, momentum=_MOMENTUM, affine=False)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Float32 or wider features [B, D], standardised; in training mode all ranks must call.

        Every rank must bring equally many images in training mode.
        """
        features = at_least_float32(features)
        if not self.training:
            return super().forward(features)
        num_images = len(features) * _world_size()
        wide = features.double()  # else the statistics would tell how many ranks summed them
        mean = _sum_over_ranks(wide.sum(dim=0)) / num_images
        variance = _sum_over_ranks((wide - mean).square().sum(dim=0)) / num_images
        if bool(variance.isfinite().all()):
            self._track(mean, variance * num_images / (num_images - 1))
        return ((wide - mean) / (variance + self.eps).sqrt()).to(features.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        for name, new in (("running_mean", mean), ("running_var", variance)):
            running = self.get_buffer(name)
            running.lerp_(new.to(running.dtype), _MOMENTUM)
        self.get_buffer("num_batches_tracked").add_(1)


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
    """Cross-entropy, mean over images and summed over heads: each gets the gradient of its own.

    Args:
        models: `probe`, the heads.
        batch: standardised features [B, D] and labels [B].
    """
    features, labels = batch
    logits = models["probe"](features)
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
    batches: Iterable[tuple[Tensor, Tensor]],
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
    counts = _sum_over_ranks(counts).cpu()
    return counts[:-1].double() / counts[-1]


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
