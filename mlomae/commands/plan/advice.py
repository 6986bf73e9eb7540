"""What to change when a plan does not fit, with what each change would leave."""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mlomae.commands.plan.cycle import Cycle, simulate
from mlomae.commands.plan.engines import offloads
from mlomae.commands.plan.speed import Cluster
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.training.deepspeed_config import check_deepspeed_config

_MAX_FACTOR = 64  # by which accumulation or the number of nodes may be raised


@dataclass(frozen=True)
class Plan:
    """A recipe on a DeepSpeed JSON on a cluster."""

    recipe: PretrainingRecipe
    config: dict[str, Any]
    cluster: Cluster

    def cycle(self) -> Cycle:
        """What it takes.

        Raises:
            UserError: the parts do not go together.
        """
        world_size = self.cluster.world_size
        check_deepspeed_config(self.config, self.recipe, world_size, "the recipe", "the JSON")
        return simulate(self.recipe, self.config, world_size)

    def with_recipe(self, key: str, value: Any) -> "Plan":
        """Another value of the recipe; raises a ValueError where its sections refuse it."""
        values = self.recipe.model_dump(exclude_none=True)
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
        return replace(self, recipe=PretrainingRecipe.model_validate(values))

    def with_zero(self, key: str, value: Any) -> "Plan":
        """Another value of the JSON's zero_optimization."""
        config = copy.deepcopy(self.config)
        config.setdefault("zero_optimization", {})[key] = value
        return replace(self, config=config)

    def with_nodes(self, nodes: int) -> "Plan":
        """The same on another number of nodes."""
        return replace(self, cluster=replace(self.cluster, nodes=nodes))


@dataclass(frozen=True)
class Step:
    """A change after those before it.

    Attributes:
        text: as it is written into recipe, JSON or command line.
        peak: bytes of the fullest moment with it.
    """

    text: str
    plan: Plan
    peak: int


def advise(plan: Plan, peak: int, budget: float) -> list[Step]:
    """Changes that make a plan fit, each upon those before, until it does.

    Cheap ones come first. One that does not lower the peak, or is not possible, is left out.
    """
    steps: list[Step] = []
    for change in (_stage, _keep_activations, _accumulate, _checkpoint, _offload, _more_nodes):
        step = None
        for text, changed in change(plan):
            with suppress(UserError, ValueError):
                changed_peak = changed.cycle().fullest.total
                if changed_peak < 0.99 * peak:
                    plan, peak = changed, changed_peak
                    step = Step(text, plan, peak)  # in place of a lesser value of the same
            if peak <= budget:
                break
        steps += [step] if step else []
        if peak <= budget:
            break
    return steps


def _stage(plan: Plan) -> Iterator[tuple[str, Plan]]:
    stage = plan.config.get("zero_optimization", {}).get("stage", 0)
    if plan.cluster.world_size > 1:
        for higher in range(stage + 1, 4):
            yield f"zero_optimization.stage {higher} in the JSON", plan.with_zero("stage", higher)


def _keep_activations(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if plan.recipe.method == "mlo_mae" and plan.recipe.hypergradient.keep_activations:
        key = "hypergradient.keep_activations"
        with suppress(ValueError):
            yield f"{key}=false", plan.with_recipe(key, False)


def _accumulate(plan: Plan) -> Iterator[tuple[str, Plan]]:
    key, factor = "pretrain.gradient_accumulation_steps", 2
    now = plan.recipe.pretrain.gradient_accumulation_steps
    share = plan.recipe.pretrain.batch_size // plan.cluster.world_size
    while factor <= _MAX_FACTOR and share % (now * factor) == 0:
        with suppress(ValueError):
            yield f"{key}={now * factor}", plan.with_recipe(key, now * factor)
        factor *= 2


def _checkpoint(plan: Plan) -> Iterator[tuple[str, Plan]]:
    if not plan.recipe.model.activation_checkpointing:
        with suppress(ValueError):  # not with every estimator
            key = "model.activation_checkpointing"
            yield f"{key}=true", plan.with_recipe(key, True)


def _offload(plan: Plan) -> Iterator[tuple[str, Plan]]:
    stage = plan.config.get("zero_optimization", {}).get("stage", 0)
    if stage and not offloads(plan.config, "offload_optimizer"):
        changed = plan.with_zero("offload_optimizer", {"device": "cpu", "pin_memory": True})
        changed.config["zero_force_ds_cpu_optimizer"] = False
        text = json.dumps({"offload_optimizer": {"device": "cpu"}})
        yield f"zero_optimization {text} in the JSON", changed


def _more_nodes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    nodes = plan.cluster.nodes
    for factor in (2, 4, 8):
        yield f"--nodes {nodes * factor}", plan.with_nodes(nodes * factor)
