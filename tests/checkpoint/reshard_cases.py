"""What every rank does in the tests of resuming on other ranks and at other ZeRO stages."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

# (ZeRO stage, compute precision, optimizer)
CASES = [
    *((stage, "float32", "adamw") for stage in (0, 2, 3)),
    *((stage, "bfloat16", "adamw") for stage in (0, 1, 3)),
    *((stage, "float32", "sgd") for stage in (0, 1, 3)),
]
NUM_STEPS = 3


class Network(nn.Module):
    """Sizes that no number of ranks divides, a weight without use, one untrained, and buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.register_buffer("mean", torch.zeros(7))
        self.last = nn.Linear(7, 3)
        self.untrained = nn.Linear(7, 1)
        self.untrained.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(11))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        with torch.no_grad():
            self.mean.copy_((self.mean + hidden.mean(0)) / 2)
        return torch.cat([self.last(hidden), self.untrained(hidden)], dim=1)


def _loss(models: Any, batch: Tensor) -> Tensor:
    return models["head"](batch).float().square().mean()


def _build(case: tuple[int, str, str], seed: int) -> Any:
    from mlomae.recipe import LevelRecipe
    from mlomae.training.engines import build_level

    stage, dtype, optimizer = case
    world_size = dist.get_world_size()
    config = {
        "train_batch_size": 2 * world_size,
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    recipe = LevelRecipe(batch_size=2 * world_size, optimizer=optimizer, lr=0.05, weight_decay=0.1)
    network = Network(seed)
    return build_level("head", network, recipe, config, loss=_loss, total_steps=10, warmup_steps=0)


def _whole(level: Any, average: list[Tensor]) -> dict[str, Tensor]:
    """Everything that the level holds, put together by the partition's own gathering."""
    partition = level.partition
    shards, state = partition.shards(), partition.optimizer.state
    names = list(partition.shapes)
    found = {}
    vectors = {"master": [s.detach().flatten() for s in shards], "average": average}
    for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        zeros = partition.zeros()
        vectors[kind] = [
            state[s][kind].detach().flatten() if kind in state[s] else z
            for s, z in zip(shards, zeros, strict=True)
        ]
    for kind, vector in vectors.items():
        for name, value in partition.gather(names, vector)[0].items():
            found[f"{kind}/{name}"] = value.clone()
    for name, value in partition.current([*names, *partition.frozen]).items():
        found[f"computes/{name}"] = value.clone()
    for name, value in level.engine.module.named_buffers():
        found[f"buffer/{name}"] = value.clone()
    steps = [float(state[s]["step"]) for s in shards if "step" in state[s]]
    found["step"] = torch.tensor(max(steps, default=0.0))
    return found


def write(folder: Path) -> dict[tuple[int, str, str], dict[str, Tensor]]:
    """Train a level of each case, write its pieces, and return what they make together."""
    from mlomae.checkpoint.level_state import optimizer_state_keys, pieces

    found = {}
    for case in CASES:
        level = _build(case, seed=0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(NUM_STEPS):
            batch = torch.randn(2, 5, generator=generator)
            level.step(batch.to(level.dtype))
        average = [s.detach().flatten() * 0.5 for s in level.partition.shards()]
        place = folder / "_".join(map(str, case))
        place.mkdir(parents=True, exist_ok=True)
        if own := pieces(level, {"average": average}):
            own = {name: tensor.clone() for name, tensor in own.items()}
            save_file(own, place / f"shards_{dist.get_rank():05d}.safetensors")
        found[case] = {"kinds": optimizer_state_keys(level), **_whole(level, average)}
        dist.barrier()
    return found


def read(
    folder: Path, kinds: dict[tuple[int, str, str], list[str]]
) -> dict[tuple[Any, Any], dict[str, Tensor]]:
    """What fresh levels of every case hold after they took over from each of the same optimizer."""
    from mlomae.checkpoint.level_state import restore

    found = {}
    for case in CASES:
        for source in CASES:
            if source[2] != case[2]:
                continue
            level = _build(case, seed=1)
            average = level.partition.zeros()
            place = folder / "_".join(map(str, source))
            restore(level, {"average": average}, kinds[source], place)
            found[source, case] = _whole(level, average)
            level.engine.destroy()
    return found


def work(
    pieces: str,
    launches: list[dict[str, Any]],
    source: str | None = None,
    kinds: Any = None,
    writes: bool = True,
) -> tuple[Any, Any, Any]:
    """Write, read what another number of ranks wrote, and drive launches; on every rank."""
    from tests.runs import drive

    own = Path(pieces) / str(dist.get_world_size())
    written = write(own) if writes else None
    taken = None if source is None else read(Path(pieces) / source, kinds)
    if dist.get_rank():
        written = taken = None  # whole on every rank, so the first one's do
    return written, taken, drive(launches)
