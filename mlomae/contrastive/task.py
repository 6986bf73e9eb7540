"""The cycles of the second and the third step of MAE-CT."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from data_ffcv import Augmentation, ImagesInfo
from mlomae.checkpoint.folders import MODEL_FILE
from mlomae.contrastive.heads import HEAD_FILE, part
from mlomae.contrastive.loss import NnclrLoss, TwoViews
from mlomae.contrastive.recipe import HeadRun, TuneRun
from mlomae.contrastive.target import TargetProjector
from mlomae.hypergrad.partition import Vector
from mlomae.training.averaging import WeightAverage
from mlomae.training.engines import TrainingLevel, full_weights
from mlomae.training.task import Task

LAST_FILE = "last_model.safetensors"


class HeadTask(Task):
    """One step of the head on two views, which the frozen encoder has seen, and of the queue.

    Args:
        level: the only one.
        encoder: makes what the level's module takes of images; nothing of it is trained. On the
            level's device, in the training's precision.
        frozen: its weights in float32 on the CPU, under the names of timm's ViT.
        loss: the level's.
        info, views: of the training images.
    """

    recipe: HeadRun | TuneRun

    def __init__(
        self,
        recipe: HeadRun | TuneRun,
        level: TrainingLevel,
        encoder: nn.Module,
        frozen: dict[str, Tensor],
        loss: NnclrLoss,
        info: ImagesInfo,
        views: tuple[Augmentation, Augmentation],
    ) -> None:
        super().__init__(recipe, {level.name: level}, info.num_samples)
        self.level, self.loss = level, loss
        self.encoder, self.frozen = encoder, frozen
        self.info, self.views = info, views

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the stream of two views at the batch of a cycle."""
        path = self.info.path
        self.open_stream(self.level.name, cycle, stack, path, self.views, with_numbers=True)

    def cycle(self) -> None:
        """One step; the queue and the averages move with it, or wait where it is skipped."""
        name = self.level.name
        *views, labels, ids = self.draw(name)
        with self.meters.timed(f"time/{name}_step"):
            inputs = self.encoder(torch.cat(views)).unflatten(0, (len(views), -1))
            batch = TwoViews(inputs, labels, ids, self.level.num_steps_done)
            self.level.step(batch)
            if self.level.was_taken:
                self.loss.queue.push(self.loss.targets[0], labels, ids)
                self.follow()
        self.measure(name)
        self.meters.add(f"{name}/nearest_neighbor_accuracy", float(self.loss.accuracy))

    def follow(self) -> None:
        """What happens after a step that was taken. All ranks must call."""

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The encoder as it came, and the head."""
        yield MODEL_FILE, self.frozen
        yield HEAD_FILE, self.head_weights(full_weights(self.level))

    def report(self) -> list[tuple[str, str]]:
        """What the loss looked neighbours up in."""
        nnclr, loss = self.recipe.nnclr, self.loss
        queue = f"{nnclr.queue_size} vectors ({nnclr.queue_layout})"
        return [("queue", queue), ("neighbour", f"of the nearest {loss.top_k}")]

    def head_weights(self, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a head file holds, under the published names. All ranks must call."""
        return {**head, **self.loss.queue.state_dict()}

    def shared_state(self) -> dict[str, Tensor]:
        """What of the queue all ranks have alike."""
        return self.loss.queue.shared_state()

    def rank_state(self) -> dict[str, Tensor]:
        """This rank's part of a sharded queue."""
        return self.loss.queue.rank_state()

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        """Take back the queue."""
        self.loss.queue.load_state(shared, of_rank)


class TuneTask(HeadTask):
    """One step of the upper encoder and the head, of their averages, and of the queue.

    Args:
        average: of the level's weights; its encoder is what the run is for.
        target: the average of the projector.
    """

    recipe: TuneRun
    average: WeightAverage
    target: TargetProjector

    def follow(self) -> None:
        """Update both averages."""
        self.average.update()
        self.target.update(projector_state(self.level))

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The averaged encoder, the last one, and the head with its averaged projector."""
        last = full_weights(self.level)
        yield MODEL_FILE, self._encoder(self.average.weights(everywhere=False))
        yield LAST_FILE, self._encoder(last)
        target = {f"target_projector.{n}": t for n, t in self.target.state_dict().items()}
        yield HEAD_FILE, self.head_weights({**part(last, "head."), **target})

    def report(self) -> list[tuple[str, str]]:
        """Also what was not trained, and which weights are which."""
        lowest = self.recipe.num_frozen_blocks
        files = f"{MODEL_FILE}: average ({self.average.decay:g}), {LAST_FILE}: last"
        return [*super().report(), ("frozen blocks", f"lowest {lowest}"), ("weights", files)]

    def _encoder(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole encoder: what was tuned, and what was not."""
        return {**self.frozen, **part(weights, "encoder.")}

    def shared_state(self) -> dict[str, Tensor]:
        """Queue and averaged projector."""
        target = {f"target.{name}": t for name, t in self.target.state_dict().items()}
        return super().shared_state() | target

    def vectors(self) -> dict[str, dict[str, Vector]]:
        """The average of encoder and head."""
        return {self.level.name: {"average": self.average.shards}}

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        """Take back queue and averaged projector."""
        super().load_state(shared, of_rank)
        self.target.load_state_dict(part(shared, "target."))


def projector_state(level: TrainingLevel) -> dict[str, Tensor]:
    """fp32 masters and buffers of a tuned projector, whole, on all ranks. All ranks must call."""
    prefix, partition = "head.projector.", level.partition
    names = [name for name in partition.shapes if name.startswith(prefix)]
    masters = [shard.detach().flatten() for shard in partition.shards()]
    weights = partition.gather(names, masters)[0]
    return part({**weights, **dict(level.engine.module.named_buffers())}, prefix)
