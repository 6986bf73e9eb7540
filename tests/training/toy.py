"""A program of the smallest kind: mean colours by gradient descent, with state of every sort."""

import gc
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_ffcv import inspect_images
from mlomae.errors import UserError
from mlomae.hypergrad.partition import Vector
from mlomae.recipe import LevelRecipe, RunRecipe
from mlomae.training.averaging import WeightAverage
from mlomae.training.program import Job, Program
from mlomae.training.task import Task, count_cycles


class ToyRecipe(RunRecipe):
    """One level, `mean`."""

    method: Literal["toy"]
    mean: LevelRecipe

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        return {"mean": self.mean}


def loss(models: Any, images: Tensor) -> Tensor:
    return (models["mean"](images.flatten(2).mean(2)) - 1).square().mean()


class ToyTask(Task):
    """Counts its cycles, sums what each place in a global batch has seen, averages its weights."""

    def __init__(self, recipe: ToyRecipe, levels: dict[str, Any], num_images: int) -> None:
        super().__init__(recipe, levels, num_images)
        self.average = WeightAverage(levels["mean"], 0.5)
        self.num_counted = torch.zeros((), dtype=torch.int64)
        self.seen = torch.zeros(recipe.mean.batch_size // dist.get_world_size(), 3)

    def open(self, cycle: int, stack: ExitStack) -> None:
        data = self.recipe.data
        self.open_stream("mean", cycle, stack, data.train, data.augmentation.build(8))

    def cycle(self) -> None:
        images, _ = self.draw("mean")
        self.levels["mean"].step(images)
        self.measure("mean")
        self.average.update()
        self.num_counted += 1
        self.seen += images.mean((2, 3))

    def evaluate(self) -> dict[str, float]:
        if (self.recipe.output_dir / "no_evaluation").exists():
            raise UserError("the test images are gone")
        return {"test/count": float(self.num_counted), "test/loss": 0.25}

    def pictures(self) -> dict[str, np.ndarray]:
        return {"square": np.zeros((4, 4, 3), np.uint8)}

    def shared_state(self) -> dict[str, Tensor]:
        return {"num_counted": self.num_counted}

    def rank_state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def vectors(self) -> dict[str, dict[str, Vector]]:
        return {"mean": {"average": self.average.shards}}

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        self.num_counted.copy_(shared["num_counted"])
        self.seen.copy_(of_rank["seen"])

    def result(self) -> dict[str, Any]:
        return {"protocol": "toy"}

    def report(self) -> list[tuple[str, str]]:
        if (self.recipe.output_dir / "no_report").exists():
            raise UserError("no report")
        return [("protocol", "toy")]


def drive_and_count(launches: list[dict[str, Any]]) -> tuple[list[Any], int]:
    """What `drive` gives, and how many engines of stage 2 are left in memory after it."""
    from deepspeed import DeepSpeedEngine

    from tests.runs import drive

    outcomes = drive(launches)
    gc.collect()
    engines = [found for found in gc.get_objects() if type(found) is DeepSpeedEngine]
    return outcomes, sum(engine.zero_optimization_stage() == 2 for engine in engines)


class ToyProgram(Program[ToyRecipe]):
    """What `drive` launches."""

    schema = ToyRecipe

    def module(self, recipe: ToyRecipe, name: str) -> nn.Module:
        torch.manual_seed(recipe.seed)
        return nn.Linear(3, 2)

    def check(self, job: Job[ToyRecipe]) -> None:
        self.num_images = inspect_images(job.recipe.data.train).num_samples
        if self.num_images < job.recipe.mean.batch_size:
            raise UserError("mean.batch_size is too large: lower it")

    def build(self, job: Job[ToyRecipe]) -> ToyTask:
        level = job.build_level(
            "mean",
            self.module(job.recipe, "mean"),
            loss=loss,
            num_cycles=count_cycles(job.recipe, self.num_images),
        )
        return ToyTask(job.recipe, {"mean": level}, self.num_images)
