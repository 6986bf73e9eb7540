"""What a segmentation is worth: IoU and accuracies from one confusion matrix of the whole set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = 255  # mask pixels that count nowhere


class ConfusionMatrix:
    """Pixels by class and prediction, summed over images and ranks.

    Means over images of each image's IoU are another number than the field's: a class that fills
    one image and is rare elsewhere would weigh as much in each.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # late: it loads slowly

        self._metric = MulticlassConfusionMatrix(
            num_classes, ignore_index=IGNORED, validate_args=False
        ).to(device)

    def add(self, prediction: Tensor, mask: Tensor) -> None:
        """Count an image: class numbers [H, W] each; pixels whose mask is 255 are left out."""
        self._metric.update(prediction, mask)

    def reduce(self) -> Tensor:
        """int64 [classes, predictions] over all ranks, on the CPU. All ranks must call."""
        return self._metric.compute().cpu()


class SegmentationScores(NamedTuple):
    """The field's three numbers, as shares in [0, 1], and what they are means of.

    Attributes:
        mIoU: mean IoU of the classes that occur in a mask or in a prediction.
        mAcc: mean share of a class's pixels that are predicted right, over the classes that occur
            in a mask.
        aAcc: share of all counted pixels that are predicted right.
        iou: of each class; None for one that occurs nowhere, which the mean leaves out.
    """

    mIoU: float
    mAcc: float
    aAcc: float
    iou: tuple[float | None, ...]

    @property
    def num_left_out(self) -> int:
        """Classes that occur nowhere."""
        return sum(value is None for value in self.iou)

    def by_name(self, classes: Sequence[str]) -> dict[str, Any]:
        """IoU of each class by its name."""
        return dict(zip(classes, self.iou, strict=True))


def score(confusion: Tensor) -> SegmentationScores:
    """Scores of a confusion matrix [classes, predictions]; a mean of nothing is 0."""
    counts = confusion.double()
    correct, labelled, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
    union = labelled + predicted - correct
    iou, accuracy = correct / union, correct / labelled
    return SegmentationScores(
        mIoU=_mean(iou[union > 0]),
        mAcc=_mean(accuracy[labelled > 0]),
        aAcc=float(correct.sum() / labelled.sum().clamp(min=1)),
        iou=tuple(float(v) if u > 0 else None for v, u in zip(iou, union, strict=True)),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
