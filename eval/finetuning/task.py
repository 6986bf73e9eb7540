"""The fine-tuning of a classifier as the trainer repeats it: one step a cycle."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from data_ffcv import Augmentation, EvalLoader, ImagesInfo, open_eval_loader
from eval.finetuning.accuracy import count_correct
from eval.finetuning.mixing import Mixer
from eval.finetuning.recipe import LEVEL, FinetuneRecipe
from eval.frozen.features import eval_augmentation
from mlomae.checkpoint.folders import MODEL_FILE
from mlomae.hypergrad.losses import Models
from mlomae.hypergrad.partition import Vector
from mlomae.models.precision import at_least_float32
from mlomae.training.averaging import WeightAverage
from mlomae.training.engines import TrainingLevel, full_weights
from mlomae.training.task import Task

AVERAGE_FILE = "model_ema.safetensors"
LAST, AVERAGE = "test", "test_ema"  # tags of the two kinds of weights
_EVAL_BATCH_SIZE = 128  # images; without gradients it takes less memory than a training batch
_LARGEST_WITH_MARGIN = 224  # pixels; MAE evaluates larger inputs without a margin


def soft_cross_entropy(models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over images [B, C, H, W] with soft labels [B, num_classes], in float32 or wider."""
    images, targets = batch
    logits = at_least_float32(models[LEVEL](images))
    loss: Tensor = SoftTargetCrossEntropy()(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class Finetuning(Task):
    """A cycle is one optimizer step of encoder and head.

    Args:
        train, test: what `recipe.data` names.
        build: makes an untrained network like the level's, which evaluations fill.

    Attributes:
        best: by tag, the highest accuracy of all evaluations so far and the epoch that it was
            reached in. It is selected on the test images.
        latest: by tag, the accuracy of the latest evaluation.
    """

    recipe: FinetuneRecipe

    def __init__(
        self,
        recipe: FinetuneRecipe,
        level: TrainingLevel,
        train: ImagesInfo,
        test: ImagesInfo,
        build: Callable[[], nn.Module],
    ) -> None:
        super().__init__(recipe, {LEVEL: level}, train.num_samples)
        self.level, self.train, self.test, self.build = level, train, test, build
        smoothing, decay = recipe.finetune.label_smoothing, recipe.finetune.ema_decay
        num_classes, rank = recipe.data.num_classes, dist.get_rank()
        self.mixer = Mixer(recipe.mixup, num_classes, smoothing, recipe.seed, rank)
        self.average = None if decay is None else WeightAverage(level, decay)
        self.best: dict[str, tuple[float, float]] = {}
        self.latest: dict[str, float] = {}

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the stream at the batch of a cycle."""
        images = self.train.path, self.recipe.train_augmentation
        self.open_stream(LEVEL, cycle, stack, *images)

    def cycle(self) -> None:
        """Draw, mix, step, and let the average follow."""
        images, labels = self.draw(LEVEL)
        images, targets = self.mixer(images, labels, self.level.num_steps_done)
        images = images.to(self.level.dtype)
        num_parts = self.recipe.finetune.gradient_accumulation_steps
        with self.meters.timed("time/finetune_step"):
            parts = zip(images.chunk(num_parts), targets.chunk(num_parts), strict=True)
            self.level.step(*parts)
            if self.average is not None and self.level.was_taken:
                self.average.update()
        self.measure(LEVEL)

    def evaluate(self) -> dict[str, float]:
        """Accuracies and loss on the test images, of the last weights and of their average."""
        measured = self._count(LAST, full_weights(self.level, everywhere=True))
        if self.average is not None:
            measured |= self._count(AVERAGE, self.average.weights())
        return measured

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The last weights, and their average."""
        yield MODEL_FILE, full_weights(self.level)
        if self.average is not None:
            yield AVERAGE_FILE, self.average.weights(everywhere=False)

    def shared_state(self) -> dict[str, Tensor]:
        """The best evaluations so far."""
        return {tag: torch.tensor(best, dtype=torch.float64) for tag, best in self.best.items()}

    def vectors(self) -> dict[str, dict[str, Vector]]:
        """The average."""
        return {} if self.average is None else {self.level.name: {"average": self.average.shards}}

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        """Take back the best evaluations."""
        self.best = {tag: (float(best[0]), float(best[1])) for tag, best in shared.items()}

    def result(self) -> dict[str, Any]:
        """The last accuracy, data, and the best one under a name that says how it was selected."""
        data = self.recipe.data
        best = {tag: {"accuracy": best, "epoch": epoch} for tag, (best, epoch) in self.best.items()}
        return {
            "accuracy": self.latest[LAST],
            "init_from": [str(path) for path in self.recipe.init_from],
            "epochs": self.recipe.epochs,
            "train": str(data.train),
            "num_train_images": self.num_images,
            "test": str(data.test),
            "num_test_images": self.test.num_samples,
            "num_classes": data.num_classes,
            "best_on_test": best,
        }

    def report(self) -> list[tuple[str, str]]:
        """The test images, and the best evaluation beside the last."""
        rows = [("test images", f"{self.recipe.data.test} ({self.test.num_samples})")]
        for tag, (best, epoch) in self.best.items():
            rows.append((f"{tag}: best on test", f"{100 * best:.2f} % after epoch {epoch:.4g}"))
        return rows

    def _count(self, tag: str, weights: dict[str, Tensor]) -> dict[str, float]:
        """Evaluate whole weights in a new network; keep the best accuracy."""
        with torch.device("meta"):  # drawing initial weights of a ViT-H would take half a minute
            vit = self.build()
        vit.load_state_dict(weights, assign=True)
        measured = count(vit, self.recipe, self.test, self.device, self.level.dtype)
        self.latest[tag] = measured["accuracy"]
        epoch = self.level.num_steps_done / self.cycles_per_epoch
        self.best[tag] = max(
            self.best.get(tag, (0.0, 0.0)), (measured["accuracy"], epoch), key=lambda best: best[0]
        )
        return {f"{tag}/{name}": value for name, value in measured.items() if name != "num_images"}


def count(
    vit: nn.Module,
    recipe: FinetuneRecipe,
    test: ImagesInfo,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Accuracies of a classifier on the test images, see `count_correct`. All ranks must call.

    Args:
        vit: with whole weights; it is moved, cast and left in eval mode.
        device, dtype: where and in which precision it computes.
    """
    vit.to(device, dtype).eval()
    loader = open_test(recipe, test, device)
    return count_correct(lambda images: vit(images.to(dtype)), loader, device)


def open_test(recipe: FinetuneRecipe, test: ImagesInfo, device: torch.device) -> EvalLoader:
    """This rank's share of the test images."""
    data = recipe.data
    return open_eval_loader(
        test.path,
        augmentation=test_augmentation(recipe, test),
        batch_size=_EVAL_BATCH_SIZE,
        mean=data.mean,
        std=data.std,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        num_workers=data.num_workers,
        backend=data.backend,
        device=device,
    )


def test_augmentation(recipe: FinetuneRecipe, test: ImagesInfo) -> Augmentation:
    """The usual crop of evaluation; inputs above 224 pixels are cut without a margin, as in MAE."""
    usual = eval_augmentation(test, recipe.model.image_size)
    size = (usual.height, usual.width)
    if usual.resize is None or max(size) <= _LARGEST_WITH_MARGIN:
        return usual
    return replace(usual, resize=size[0] if size[0] == size[1] else size)
