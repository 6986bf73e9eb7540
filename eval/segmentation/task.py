"""The training of a segmentation network as the trainer repeats it: one step a cycle."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from data_ffcv import BetonInfo, WholeImages
from eval.segmentation.inference import Predictor
from eval.segmentation.metrics import IGNORED, ConfusionMatrix, SegmentationScores, score
from eval.segmentation.pictures import palette, segmentation_picture
from eval.segmentation.recipe import LEVEL, SegmentationRecipe
from mlomae.checkpoint.folders import MODEL_FILE
from mlomae.distributed.watchdog import mark
from mlomae.hypergrad.losses import Models
from mlomae.models.upernet import UperNet
from mlomae.training.engines import TrainingLevel, full_weights
from mlomae.training.task import Task

HEAD_FILE = "segmentation.safetensors"  # neck and heads; the encoder is in model.safetensors
ENCODER = "backbone."
_LARGEST_REPORT = 30  # classes; more are in result.json alone


class SegmentationLoss:
    """Cross-entropy of the head, and a share of the auxiliary head's."""

    def __init__(self, auxiliary_weight: float) -> None:
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of images [B, 3, h, w] with masks int64 [B, h, w]."""
        images, masks = batch
        out = models[LEVEL](images)
        loss = pixel_cross_entropy(out["logits"], masks)
        if out["auxiliary"] is not None:
            loss = loss + self.auxiliary_weight * pixel_cross_entropy(out["auxiliary"], masks)
        return loss


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean over all pixels of [B, num_classes, h, w], those without a class counting 0 (mmseg).

    A mean over the labelled pixels would weigh a pixel by how many share its micro-batch with it,
    and has no value where none is labelled.
    """
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


class SegmentationTask(Task):
    """A cycle is one optimizer step of encoder, neck and heads.

    Args:
        train, test: what `recipe.data` names.
        build: makes an untrained network like the level's, which evaluations fill.

    Attributes:
        scores: of the latest evaluation.
    """

    recipe: SegmentationRecipe

    def __init__(
        self,
        recipe: SegmentationRecipe,
        level: TrainingLevel,
        train: BetonInfo,
        test: BetonInfo,
        build: Callable[[], UperNet],
    ) -> None:
        super().__init__(recipe, {LEVEL: level}, train.num_samples)
        self.level, self.train, self.test, self.build = level, train, test, build
        self.scores: SegmentationScores | None = None

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the stream at the batch of a cycle."""
        images = self.train.path, self.recipe.train_augmentation
        self.open_stream(LEVEL, cycle, stack, *images)

    def cycle(self) -> None:
        """Draw, and step."""
        images, masks = self.draw(LEVEL)
        num_parts = self.recipe.segmentation.gradient_accumulation_steps
        with self.meters.timed("time/segmentation_step"):
            self.level.step(*zip(images.chunk(num_parts), masks.chunk(num_parts), strict=True))
        self.measure(LEVEL)

    def evaluate(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc of the test images, each counted once."""
        self.scores = evaluate(self._network(), self.recipe, self.test, self.device)
        return tagged(self.scores)

    def pictures(self) -> dict[str, np.ndarray]:
        """The first test images with mask and prediction."""
        network = self._network()
        if dist.get_rank():
            return {}
        count = self.recipe.monitor.num_pictures
        return {LEVEL: draw(network, self.recipe, self.test, self.device, count)}

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The encoder under timm's names, and the rest."""
        yield from split_weights(full_weights(self.level)).items()

    def result(self) -> dict[str, Any]:
        """Data, protocol and the IoU of each class."""
        return {
            "init_from": [str(path) for path in self.recipe.init_from],
            "epochs": self.recipe.epochs,
            "train": str(self.train.path),
            "num_train_images": self.num_images,
            **describe(self.recipe, self.test, self.scores),
        }

    def report(self) -> list[tuple[str, str]]:
        """The test images, how they were segmented, and the IoU of each class."""
        inference = self.recipe.inference
        how = f"{inference.mode}, shorter side {inference.resize or 'as it is'}"
        stride = f", stride {self.recipe.stride}" if inference.mode == "slide" else ""
        rows = [
            ("test images", f"{self.test.path} ({self.test.num_samples})"),
            ("head", f"UperNet {self.recipe.head.preset}"),
            ("inference", how + stride),
        ]
        if self.scores is not None and self.test.num_classes <= _LARGEST_REPORT:
            for name, value in self.scores.by_name(self.test.classes).items():
                text = "occurs nowhere, left out" if value is None else f"{100 * value:.2f} %"
                rows.append((f"IoU {name}", text))
        return rows

    def _network(self) -> UperNet:
        """The whole weights in a new network: ranks may pass unlike numbers of windows.

        All ranks must call.
        """
        weights = full_weights(self.level, everywhere=True)
        with torch.device("meta"):
            network = self.build()
        network.load_state_dict(weights, assign=True)
        return to_inference(network, self.device, self.level.dtype)


def to_inference(network: UperNet, device: torch.device, dtype: torch.dtype) -> UperNet:
    """Move a network, put it in eval mode, and cast all but its statistics, as DeepSpeed does."""
    network.to(device).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def evaluate(
    network: UperNet,
    recipe: SegmentationRecipe,
    test: BetonInfo,
    device: torch.device,
    shows_progress: bool = False,
) -> SegmentationScores:
    """Scores of a network in eval mode on the test images. All ranks must call."""
    predict = Predictor(lambda images: network(images)["logits"], recipe, device)
    confusion = ConfusionMatrix(recipe.data.num_classes, device)
    images = WholeImages(test.path, rank=dist.get_rank(), world_size=dist.get_world_size())
    is_shown = shows_progress and dist.get_rank() == 0
    for image, mask in track(images, test.path.name, disable=not is_shown, transient=True):
        mark("evaluating")
        confusion.add(predict(image), torch.from_numpy(mask).long().to(device))
    return score(confusion.reduce())


def tagged(scores: SegmentationScores) -> dict[str, float]:
    """The three numbers by their TensorBoard tags."""
    return {f"test/{name}": getattr(scores, name) for name in ("mIoU", "mAcc", "aAcc")}


def describe(
    recipe: SegmentationRecipe, test: BetonInfo, scores: SegmentationScores | None
) -> dict[str, Any]:
    """What a result file says besides the three numbers."""
    inference = recipe.inference
    stride = {"stride": recipe.stride} if inference.mode == "slide" else {}
    described: dict[str, Any] = {
        "test": str(test.path),
        "num_test_images": test.num_samples,
        "num_classes": test.num_classes,
        "inference": inference.model_dump() | stride,
        "colours": palette(test.num_classes)[: test.num_classes].tolist(),
    }
    if scores is not None:
        described["num_classes_left_out"] = scores.num_left_out
        described["IoU"] = scores.by_name(test.classes)
    return described


def draw(
    network: UperNet, recipe: SegmentationRecipe, test: BetonInfo, device: torch.device, count: int
) -> np.ndarray:
    """The first test images with mask and prediction, uint8 [H, W, 3]."""
    predict = Predictor(lambda images: network(images)["logits"], recipe, device)
    samples = [
        (image, mask, predict(image).cpu().numpy())
        for image, mask in itertools.islice(WholeImages(test.path), count)
    ]
    return segmentation_picture(samples, test.classes)


def split_weights(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A network's state by file: the encoder under timm's names first, then the rest."""
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: {}, HEAD_FILE: {}}
    for name, tensor in weights.items():
        file = MODEL_FILE if name.startswith(ENCODER) else HEAD_FILE
        files[file][name.removeprefix(ENCODER)] = tensor
    return files


def join_weights(encoder: dict[str, Tensor], rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split_weights`."""
    return {f"{ENCODER}{name}": tensor for name, tensor in encoder.items()} | rest
