"""What the plan expects of MLO-MAE on 1 to 64 nodes of 8 A100: the tables of docs/scaling.md.

Nothing is measured here. Weak scaling keeps 32 images of every level on a GPU, strong scaling the
recipes' 256 over all.
"""

import warnings
from collections.abc import Iterator

from _about import HERE, table

from mlomae.commands.plan.advice import Plan
from mlomae.commands.plan.command import RESERVE
from mlomae.commands.plan.cycle import Cycle
from mlomae.commands.plan.hardware import GB, GPUS
from mlomae.commands.plan.speed import Cluster, Speed, expected_speed
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training.deepspeed_config import compute_dtype, load_deepspeed_config

ROOT = HERE.parent
MODELS = {"base_patch16": "zero1", "large_patch16": "zero1", "huge_patch14": "zero2"}
NODES = (1, 2, 4, 8, 16, 32, 64)
LEVELS = ("pretrain", "classifier", "mask")
PER_NODE, UTILIZATION = 8, 0.4
BANDWIDTHS = (25.0, 200.0)  # GB/s between nodes: one card of 200 Gb/s, and eight


def main() -> None:
    """Print both tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    heads = ["model, ZeRO", "nodes", "images a GPU", "GB a GPU"]
    for bandwidth in BANDWIDTHS:
        heads += [f"images/s at {bandwidth:.0f} GB/s", "/ 1 node", "waits"]
    heads += ["crops/s a node, all overlapping"]
    for kind in ("weak", "strong"):
        print(f"\n{kind}\n", *table(heads, list(_rows(kind))), sep="\n", flush=True)


def _rows(kind: str) -> Iterator[list[str]]:
    for model, config in MODELS.items():
        alone: list[Speed] = []
        for nodes in NODES:
            batch_size = 256 * (nodes if kind == "weak" else 1)
            if batch_size % (nodes * PER_NODE) == 0:
                cycle, speeds = _plan(model, config, nodes, batch_size)
                alone = alone or speeds
                row = [f"{model}, {config[-1]}", str(nodes), str(batch_size // nodes // PER_NODE)]
                row += [f"{(cycle.fullest.total + RESERVE) / GB:.1f}"]
                for speed, first in zip(speeds, alone, strict=True):
                    row += [f"{speed.images_per_second:.0f}"]
                    row += [f"{speed.images_per_second / first.images_per_second:.1f}"]
                    row += [f"{100 * speed.communication_share:.0f} %"]
                yield [*row, f"{speeds[-1].loader_rate:.0f}"]


def _plan(model: str, config: str, nodes: int, batch_size: int) -> tuple[Cycle, list[Speed]]:
    overrides = [f"{level}.batch_size={batch_size}" for level in LEVELS]
    recipe = load_recipe(f"mlo_mae_vit_{model}_imagenet", PretrainingRecipe, overrides)
    deepspeed_config = load_deepspeed_config(ROOT / "ds_configs" / f"{config}_bf16.json")
    clusters = [
        Cluster(GPUS["a100-80gb"], nodes, PER_NODE, UTILIZATION, bandwidth * GB)
        for bandwidth in BANDWIDTHS
    ]
    cycle = Plan(recipe, deepspeed_config, clusters[0]).cycle()
    dtype = compute_dtype(deepspeed_config)
    return cycle, [expected_speed(recipe, cycle, cluster, dtype) for cluster in clusters]


if __name__ == "__main__":
    main()
