"""What a run trains: its levels, what a cycle of them does, and what it leaves."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_ffcv import Augmentation, Stream, open_stream
from mlomae.checkpoint.folders import MODEL_FILE
from mlomae.distributed.watchdog import mark
from mlomae.hypergrad.partition import Vector
from mlomae.recipe import RunRecipe
from mlomae.training.engines import TrainingLevel, full_weights
from mlomae.training.monitor import Meters


class Task(ABC):
    """Levels on their engines, and the cycle that the trainer repeats.

    Args:
        levels: by name, lowest first. The first one's steps number the checkpoints, and its images
            are those of an epoch.
        num_images: training images of the first level.

    Attributes:
        device: where the levels compute.
        streams: of training batches, by level; `open` fills it.
        meters: sums since the last row.
        num_cycles: of the whole run.
        images_per_cycle: of the first level, over all ranks.
        grid_size: rows and columns of `masking/frequency`, where there is such a row.
    """

    grid_size: tuple[int, int] | None = None

    def __init__(
        self, recipe: RunRecipe, levels: dict[str, TrainingLevel], num_images: int
    ) -> None:
        self.recipe = recipe
        self.levels = levels
        self.num_images = num_images
        self.device: torch.device = self.first_level.engine.device
        self.streams: dict[str, Stream] = {}
        self.meters = Meters(self.device)
        first = next(iter(recipe.levels.values()))
        self.num_cycles = count_cycles(recipe, num_images)
        self.images_per_cycle = first.batch_size * first.steps_per_cycle
        self.cycles_per_epoch = num_images / self.images_per_cycle

    @property
    def first_level(self) -> TrainingLevel:
        """The level whose steps count."""
        return next(iter(self.levels.values()))

    @abstractmethod
    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the streams at the batches of a cycle; the stack closes them."""

    @abstractmethod
    def cycle(self) -> None:
        """Draw the batches of one cycle, and step. All ranks must call."""

    def evaluate(self) -> dict[str, float]:
        """Numbers by TensorBoard tag, such as `test/accuracy`. All ranks must call."""
        return {}

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] by name, of use on the first rank. All ranks must call."""
        return {}

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Files of whole weights that a checkpoint holds, one at a time; `model.safetensors` first.

        All ranks must call, and go through all of them; the first writes.
        """
        yield MODEL_FILE, full_weights(self.first_level)

    def vectors(self) -> dict[str, dict[str, Vector]]:
        """What else is cut as a level's weights are, such as averages: by level, by name.

        A checkpoint holds it, and fills it in place when the run is resumed.
        """
        return {}

    def shared_state(self) -> dict[str, Tensor]:
        """What else a resumed run needs and all ranks have alike."""
        return {}

    def rank_state(self) -> dict[str, Tensor]:
        """What else a resumed run needs and is cut into equal parts along the first dimension.

        Rank r has the r-th part; on another number of ranks, the whole is cut anew.
        """
        return {}

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        """Take back what `shared_state` and `rank_state` gave; both are on the CPU."""
        assert not shared and not of_rank

    def result(self) -> dict[str, Any]:
        """What `result.json` says besides the last evaluation: protocol, settings, data."""
        return {}

    def report(self) -> list[tuple[str, str]]:
        """Rows (what, value) of the one-page report besides those that every run has."""
        return []

    def open_stream(
        self,
        name: str,
        cycle: int,
        stack: ExitStack,
        path: Path,
        augmentation: Augmentation | Sequence[Augmentation],
        indices: np.ndarray | None = None,
        with_numbers: bool = False,
    ) -> None:
        """Open a level's stream at its batches of a cycle; for `open`.

        Args:
            path, augmentation, indices, with_numbers: as `data_ffcv.open_stream` has them.
        """
        level, data, world_size = self.recipe.levels[name], self.recipe.data, dist.get_world_size()
        stream = open_stream(
            path,
            augmentation=augmentation,
            indices=indices,
            batch_size=level.batch_size // world_size,
            seed=self.recipe.seed,
            name=name,
            rank=dist.get_rank(),
            world_size=world_size,
            mean=data.mean,
            std=data.std,
            start_batch=cycle * level.steps_per_cycle,
            with_numbers=with_numbers,
            num_workers=data.num_workers,
            backend=data.backend,
            device=self.device,
        )
        self.streams[name] = stack.enter_context(stream)

    def draw(self, name: str) -> tuple[Tensor, ...]:
        """The next batch of a level's stream."""
        stream = self.streams[name]
        mark(f"drawing {name} batch {stream.batches_drawn}")
        with self.meters.timed("time/data"):
            batch = next(stream)
        mark(f"the {name} step on batch {stream.batches_drawn - 1}")
        return batch

    def measure(self, name: str, norm: str = "grad_norm") -> None:
        """Count loss, rate and gradient norm of a level's latest step."""
        level = self.levels[name]
        self.meters.add(f"{name}/loss", level.latest_loss)
        self.meters.add(f"{name}/lr", level.lr)
        self.meters.add(f"{name}/{norm}", level.grad_norm)


def count_cycles(recipe: RunRecipe, num_images: int) -> int:
    """Cycles in the recipe's epochs over the images of the first level, at least one."""
    first = next(iter(recipe.levels.values()))
    steps = recipe.epochs * (num_images // first.batch_size)
    return max(1, round(steps / first.steps_per_cycle))
