"""The estimators that `mlomae gradcheck` compares, and what it measures of each."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from mlomae.commands.gradcheck.memory import PeakMemory
from mlomae.commands.gradcheck.problem import LOWER, Labelled, NamedTensors, RandomBatches, Truth
from mlomae.hypergrad import Estimator, FiniteDifference, Hypergradient, Identity, Level
from mlomae.hypergrad.reference import cosine, relative_error
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import MloMaeProblem
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import HypergradientRecipe
from mlomae.recipe.hypergradient import ESTIMATOR_KEYS, build_estimator
from mlomae.training.engines import TrainingLevel

NUM_CYCLES = 5  # whose medians are shown, for costs and for errors
STEP_KEYS = ("pretrain_steps", "classifier_steps")
NO_DIFFERENCE = {"relative_step": None, "radius": None}

Call = Callable[[], object]


@dataclass(frozen=True)
class Cost:
    """What a call takes: its time, and the most bytes at once while it runs, on this rank."""

    seconds: float
    bytes: int


@dataclass
class Row:
    """One estimator and what was measured of it.

    Attributes:
        section: what a recipe says to get it.
        is_of_recipe: whether it is the recipe's.
        steps: newest steps of each lower level that its truth goes back through.
        reason: why it cannot be used here; empty when it can.
        cost: of one hypergradient; bytes above those of the cycle's beginning, so what the steps
            record for it counts as well.
    """

    section: HypergradientRecipe
    is_of_recipe: bool
    steps: dict[str, int]
    reason: str = ""
    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    cost: Cost = Cost(0.0, 0)

    def __post_init__(self) -> None:
        self.estimator = build_estimator(self.section)

    @property
    def name(self) -> str:
        """The estimator with what differs from the defaults; its steps stand in the table."""
        section, estimator = self.section, self.estimator
        fields = type(section).model_fields
        keys = [key for key in ESTIMATOR_KEYS[section.estimator] if key not in STEP_KEYS]
        values = {key: getattr(section, key) for key in (*keys, *NO_DIFFERENCE)}
        changed = [f"{k}={v:g}" for k, v in values.items() if v != fields[k].default]
        if isinstance(estimator, FiniteDifference):
            name = type(estimator.estimator).__name__
            return f"FiniteDifference({', '.join([name, *changed])})"
        name = type(estimator).__name__
        return f"{name}({', '.join(changed)})" if changed else name

    @property
    def error(self) -> float:
        return statistics.median(self.errors)

    @property
    def cosine(self) -> float:
        return statistics.median(self.cosines)


def make_rows(recipe: PretrainingRecipe) -> list[Row]:
    """Every estimator, exact ones first, and the recipe's where it is none of them."""
    recipe_section = recipe.hypergradient
    taken = {name: recipe.levels[name].steps_per_cycle for name in LOWER}
    whole = {f"{name}_steps": num for name, num in taken.items()}
    changes: list[dict[str, Any]] = [
        {"estimator": "unrolled"},
        {"estimator": "unrolled", **whole},
        *({"estimator": name} for name in ESTIMATOR_KEYS if name != "unrolled"),
        {"estimator": "unrolled", "relative_step": 1e-4},
        {"estimator": "identity", "radius": 0.01},
    ]
    sections = [recipe_section.model_copy(update={**NO_DIFFERENCE, **change}) for change in changes]
    rows: list[Row] = []
    for section in [*sections, recipe_section]:
        if section not in [row.section for row in rows]:
            steps = {name: getattr(section, f"{name}_steps") for name in LOWER}
            has_steps = ESTIMATOR_KEYS[section.estimator] == STEP_KEYS
            is_of_recipe = section == recipe_section
            rows.append(Row(section, is_of_recipe, steps if has_steps else taken))
    return rows


class Bench:
    """The levels with random batches, on which every estimator is measured. All ranks must call.

    The masking network takes no step, so that no row depends on those above it.
    """

    def __init__(self, recipe: PretrainingRecipe, levels: dict[str, TrainingLevel]) -> None:
        self._recipe, self._levels = recipe, levels
        self._device: torch.device = levels["pretrain"].engine.device
        self._schedule = MaskSchedule.of(recipe, levels["pretrain"].total_steps)
        self._num_draws = 0

    def measure_unit(self) -> Cost:
        """The cost of the forward and backward pass of one encoder step."""
        problem = self._problem(_Recorder())
        level = problem.pretrain

        def begin() -> Call:
            images = self._draw().micro_batches()
            return partial(level.backward, *self._schedule.batches(images, self._num_draws))

        def end() -> None:
            level.discard()
            problem.clear()

        return self._measure(begin, end)

    def measure_cost(self, row: Row) -> None:
        """Train some cycles for the row's estimator alone, as a run of it would."""
        try:
            problem = self._problem(row.estimator)
            row.cost = self._measure(
                lambda: partial(_hypergradient, problem, self._train(problem)), problem.clear
            )
        except ValueError as error:
            row.reason = str(error)

    def compare(self, rows: list[Row]) -> None:
        """Ask all rows about the same recorded cycles, and compare with the truth."""
        problem = self._problem(_Recorder())
        reference = Truth(self._recipe, self._levels)
        usable = [row for row in rows if not row.reason]
        # The recipe's comes first, for what a step keeps serves one sweep, as in training.
        usable.sort(key=lambda row: not row.is_of_recipe)
        for _ in range(NUM_CYCLES):
            batch = self._train(problem, reference)
            truths: dict[str, NamedTensors] = {}
            for row in usable:
                key = str(row.steps)
                if key not in truths:
                    truths[key] = reference.hypergradient(row.steps, batch)
                problem.estimator = row.estimator
                estimate = problem.mask.named(_hypergradient(problem, batch).vector)
                row.errors.append(relative_error(estimate, truths[key]))
                row.cosines.append(cosine(estimate, truths[key]))
            problem.clear()

    def _problem(self, estimator: Estimator) -> MloMaeProblem:
        return MloMaeProblem(*self._levels.values(), estimator=estimator, schedule=self._schedule)

    def _measure(self, begin: Callable[[], Call], end: Callable[[], None]) -> Cost:
        """Memory in one run, since counting takes time, then the time of several."""
        with PeakMemory(self._device) as memory:
            call = begin()
            memory.restart()
            call()
        end()
        seconds = []
        for _ in range(NUM_CYCLES):
            call = begin()
            start = self._now()
            call()
            seconds.append(self._now() - start)
            end()
        return Cost(statistics.median(seconds), memory.bytes)

    def _train(self, problem: MloMaeProblem, reference: Truth | None = None) -> Labelled:
        """Take the lower levels' steps of one cycle, and return the mask level's batch."""
        problem.clear()
        batches = self._draw()
        for name in LOWER:
            level = self._levels[name]
            for _ in range(level.num_steps):
                if reference is not None:
                    reference.note(level)
                if name == "pretrain":
                    problem.pretrain_step(batches.micro_batches())
                else:
                    problem.classifier_step(*batches.labelled(name))
        # A step may have been skipped for its numbers; the third in a row is an error.
        is_whole = problem.is_recorded(*LOWER)
        return batches.labelled("mask") if is_whole else self._train(problem, reference)

    def _draw(self) -> RandomBatches:
        self._num_draws += 1
        return RandomBatches(self._recipe, self._num_draws, self._device)

    def _now(self) -> float:
        """Seconds, once all ranks have done what they were asked for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        dist.barrier()
        return time.perf_counter()


class _Recorder(Identity):
    """Records every step of a cycle, whoever may ask about it."""

    def window(self, level: Level) -> int:
        return level.num_steps

    def check(self, level: Level) -> None:
        pass


def _hypergradient(problem: MloMaeProblem, batch: Labelled) -> Hypergradient:
    module = problem.classifier.engine.module.eval()  # as in training, no dropout here
    try:
        return problem.hypergradient("mask", batch)
    finally:
        module.train()
