"""How many images of a test set get their label, counted over all ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_ffcv import EvalLoader
from mlomae.distributed.collectives import sum_over_ranks
from mlomae.distributed.watchdog import mark
from mlomae.models.precision import at_least_float32


@torch.no_grad()
def count_correct(
    logits_of: Callable[[Tensor], Tensor],
    loader: EvalLoader,
    device: torch.device,
    topk: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Accuracies and the mean cross-entropy of the images of all ranks. All ranks must call.

    Ranks may hold different numbers of images and of batches, so `logits_of` must not communicate:
    give it a plain module in eval mode with whole weights, and no ZeRO-3 engine.

    Args:
        logits_of: images [B, C, H, W] on the device -> logits [B, num_classes].
        loader: this rank's images; over all ranks each occurs once.
        topk: an image counts for k when its label is among its k largest logits; a k above the
            number of classes is left out.

    Returns:
        `accuracy` (k = 1) and `top<k>_accuracy` as shares in [0, 1], `loss` in nats, `num_images`.
    """
    topk = [k for k in topk if k <= loader.info.num_classes]
    sums = torch.zeros(2 + len(topk), dtype=torch.float64, device=device)
    for images, labels in loader:
        mark("evaluating")
        labels = labels.to(device)
        logits = at_least_float32(logits_of(images.to(device)))
        is_label = logits.topk(max(topk), dim=1).indices == labels[:, None]
        sums[0] += len(labels)
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
        for column, k in enumerate(topk, start=2):
            sums[column] += is_label[:, :k].sum()
    num_images, loss, *correct = sum_over_ranks(sums).tolist()
    names = ("accuracy" if k == 1 else f"top{k}_accuracy" for k in topk)
    accuracies = {name: count / num_images for name, count in zip(names, correct, strict=True)}
    return {**accuracies, "loss": loss / num_images, "num_images": int(num_images)}
