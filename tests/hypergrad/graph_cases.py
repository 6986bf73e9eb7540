"""What the graph tests run on every rank: small level graphs on real DeepSpeed engines."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.hypergrad import Estimator, Level, Multilevel, Unrolled
from mlomae.hypergrad.partition import Vector
from mlomae.hypergrad.reference import (
    OptimizerRules,
    ReferenceLevel,
    cosine,
    hypergradient,
    relative_error,
)
from tests.hypergrad.engine_cases import _hash, fingerprint_of
from tests.hypergrad.problems import PROBLEMS, LevelSpec, make_optimizer
from tests.hypergrad.readings import record_bytes, reduced_gradient
from tests.ranks import ROOT

BATCH = 8  # over all ranks and micro-batches
WARM_CYCLES = 2
MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class Graph:
    """One problem on engines, and the reference of its next cycle.

    Args:
        problem: by its name in `PROBLEMS`.
        shipped: a file of `ds_configs`, computed in bf16 as it stands or in fp32.
        kind: of the lower levels' optimizer.
        num_steps: of every lower level in a cycle; all are unrolled.
        num_micro: micro-batches of every lower level's step.
    """

    def __init__(
        self,
        problem: str,
        shipped: str,
        dtype: str,
        kind: str = "adamw",
        num_steps: int = 1,
        num_micro: int = 1,
        max_norm: float = 0.0,
        estimator: Estimator | None = None,
    ) -> None:
        self.problem = PROBLEMS[problem](torch.float32)
        self.shipped, self.dtype = shipped, dtype
        self.optimizer, self.kind = kind, "sgd" if kind == "momentum" else kind
        self.num_steps, self.num_micro, self.max_norm = num_steps, num_micro, max_norm
        # Engines change their modules; the reference has its own.
        self.modules = {spec.name: copy.deepcopy(spec.module) for spec in self.problem.levels}
        self.generator = torch.Generator().manual_seed(5)
        self.levels = []
        for spec in self.problem.levels:
            self.levels.append(self._level(spec))
        estimator = estimator or Unrolled(steps=num_steps)
        self.multilevel = Multilevel(self.levels, estimator=estimator)

    def beside(self, module: nn.Module) -> "Graph":
        """The same lower levels in another problem, whose target has another module."""
        other = copy.copy(self)
        target = dataclasses.replace(self.problem.target, module=module)
        other.levels = [*self.levels[:-1], self._level(target)]
        other.multilevel = Multilevel(other.levels, estimator=self.multilevel.estimator)
        return other

    def _level(self, spec: LevelSpec) -> Level:
        is_target = spec.name == self.problem.target.name
        engine, *_ = deepspeed.initialize(
            model=spec.module,
            optimizer=make_optimizer("sgd" if is_target else self.optimizer, spec.module),
            config=self._config(1 if is_target else self.num_micro),
        )
        return Level(
            spec.name, engine, loss=spec.loss, lower=spec.lower, upper=spec.upper,
            num_steps=1 if is_target else self.num_steps, settings=spec.settings,
        )  # fmt: skip

    def _config(self, num_micro: int) -> dict[str, Any]:
        config = json.loads((ROOT / "ds_configs" / f"{self.shipped}.json").read_text())
        config["bf16"]["enabled"] = self.dtype == "bf16"
        return config | {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // num_micro,
            "gradient_accumulation_steps": num_micro,
            "gradient_clipping": self.max_norm,
        }

    def warm_up(self) -> None:
        """Some cycles of the lower levels, for at Adam's first step there is next to no slope."""
        for _ in range(WARM_CYCLES):
            for level in self.levels[:-1]:
                self.multilevel.step(level.name, *self._mine(self._batch(), self.num_micro))
        self.multilevel.clear()

    def compare(self) -> dict[str, float]:
        """One cycle's hypergradient beside the reference's."""
        value, truth = self.cycle()
        return {"error": relative_error(value, truth), "cosine": cosine(value, truth)}

    def cycle(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next cycle's hypergradient, and the reference's."""
        references = [self._step(level) for level in self.levels[:-1]]
        target, batch = self.levels[-1], self._batch()
        result = self.multilevel.hypergradient(target.name, *self._mine(batch, 1))
        references.append(self._reference(target, [[batch]]))
        value = target.named(result.vector)
        self.multilevel.clear()
        return value, hypergradient(references, target.name)

    def _step(self, level: Level) -> ReferenceLevel:
        batches = [self._batch() for _ in range(self.num_steps)]
        reference = self._reference(level, [[batch] for batch in batches])
        for batch in batches:
            self.multilevel.step(level.name, *self._mine(batch, self.num_micro))
        return reference

    def _reference(self, level: Level, batches: list[Any]) -> ReferenceLevel:
        """The level as it stands, in float64, with the batches of all ranks together."""
        spec = next(s for s in self.problem.levels if s.name == level.name)
        module = self.modules[level.name]
        module.double().load_state_dict(level.named(level.partition.weights()))
        rules = OptimizerRules()
        if spec is not self.problem.target:
            rules = self._rules(level)
        return ReferenceLevel(level.name, module, spec.loss, batches, rules, settings=spec.settings)

    def _rules(self, level: Level) -> OptimizerRules:
        partition, optimizer = level.partition, level.optimizer
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        states = [optimizer.state[shard] for shard in partition.shards()]
        memories = {k: level.named(_flat(states, k)) for k in MOMENTS[self.kind] if k in states[0]}
        # `make_optimizer`: matrices first, then vectors.
        group_of = {n: 0 if len(shape) > 1 else 1 for n, shape in partition.shapes.items()}
        memory: dict[str, dict[str, Any]] = {
            n: {k: whole[n].double() for k, whole in memories.items()} for n in group_of
        }
        for entry in memory.values():
            entry["step"] = float(states[0].get("step", 1))
        return OptimizerRules(self.kind, groups, group_of, memory, self.max_norm)

    def _batch(self) -> tuple[Tensor, Tensor]:
        return self.problem.batch(self.generator, size=BATCH)

    def _mine(self, batch: tuple[Tensor, Tensor], num_micro: int) -> list[tuple[Tensor, Tensor]]:
        rank, size = dist.get_rank(), dist.get_world_size()
        tokens, labels = (t.chunk(size)[rank].chunk(num_micro) for t in batch)
        dtype = self.levels[0].partition.dtype
        return [(t.to(dtype), y) for t, y in zip(tokens, labels, strict=True)]

    def destroy(self) -> None:
        for level in self.levels:
            level.model.destroy()
        deepspeed.comm.barrier()


def _flat(states: list[dict[str, Any]], key: str) -> Vector:
    return [state[key].detach().flatten() for state in states]


def against_reference(cases: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Error and cosine in several cycles of each case."""
    results = []
    for case in cases:
        graph = Graph(**case)
        graph.warm_up()
        num_cycles = 3 if case["dtype"] == "bf16" else 1
        results.append([graph.compare() for _ in range(num_cycles)])
        graph.destroy()
    return results


def leaves_no_trace(cases: list[dict[str, Any]]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """State of all levels before and after a hypergradient by each estimator."""
    results = []
    for case in cases:
        graph = Graph(**case, num_steps=2)
        graph.warm_up()
        for level in graph.levels[:-1]:
            graph._step(level)
        target, batch = graph.levels[-1], graph._mine(graph._batch(), 1)
        states = []
        for _ in range(2):
            state = {"random state": _hash(torch.get_rng_state())}
            for level in graph.levels[:-1]:
                state |= fingerprint_of(level)
            state["upper"] = _hash(*target.partition.weights(), *reduced_gradient(target.partition))
            states.append(state)
            result = graph.multilevel.hypergradient(target.name, *batch)
            assert all(bool(v.isfinite().all()) for v in target.named(result.vector).values())
        results.append(tuple(states))
        graph.destroy()
    return results


def shard_bytes(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What this rank holds of the recorded steps, of an adjoint and of the weights."""
    results = []
    for case in cases:
        graph = Graph(**case)
        graph.warm_up()
        for level in graph.levels[:-1]:
            graph._step(level)
        lower = graph.levels[0]
        vector = lower.partition.zeros()
        results.append(
            {
                "records": sum(map(record_bytes, lower.records)),
                "vector": sum(t.numel() * t.element_size() for t in vector),
                "num_records": len(lower.records),
                "numel": sum(shape.numel() for shape in lower.partition.shapes.values()),
            }
        )
        graph.destroy()
    return results


def cycles_train(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole cycles with the upper level's own steps: losses, and whether its weights moved."""
    results = []
    for case in cases:
        graph = Graph(**case)
        target = graph.levels[-1]
        before = target.named(target.partition.weights())
        before = {name: value.clone() for name, value in before.items()}
        num = graph.num_micro
        sources = {
            level.name: iter(
                part for _ in range(12)
                for part in graph._mine(graph._batch(), 1 if level is target else num)
            )
            for level in graph.levels
        }  # fmt: skip
        losses = [graph.multilevel.cycle(sources) for _ in range(2)]
        after = target.named(target.partition.weights())
        results.append(
            {
                "losses": [{n: float(v) for n, v in values.items()} for values in losses],
                "moved": relative_error(after, {n: v.double() for n, v in before.items()}),
                "weights": {n: v.clone() for n, v in after.items()},
            }
        )
        graph.destroy()
    return results


def two_uppers_in_turn(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors of two problems whose lower levels are the same, and what they refuse."""
    results = []
    for case in cases:
        graph = Graph(**case)
        module = copy.deepcopy(graph.modules["theta"])
        for param in module.parameters():
            nn.init.normal_(param, generator=torch.Generator().manual_seed(1))
        other = graph.beside(module)
        graph.warm_up()
        errors = [each.compare()["error"] for each in (graph, other, graph, other)]
        w, batch = graph.levels[0], graph._mine(graph._batch(), graph.num_micro)
        ambiguous = _refusal(lambda: w.step(*batch))  # noqa: B023 - called here
        for level in graph.levels[:-1]:
            graph._step(level)
        other.multilevel.step("w", *batch)
        stale = _refusal(lambda: graph.multilevel.hypergradient("theta", *batch))  # noqa: B023
        results.append({"errors": errors, "ambiguous": ambiguous, "stale": stale})
        other.levels[-1].model.destroy()
        graph.destroy()
    return results


def _refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    return str(refused.value)


def several(jobs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Several of the functions here, by name: starting processes costs more than most of them."""
    return {name: globals()[name](cases) for name, cases in jobs.items()}
