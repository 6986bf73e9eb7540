"""What the engine tests run on every rank: MLO-MAE cycles on real DeepSpeed engines."""

import copy
import hashlib
import json
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.hypergrad import Level, Unrolled
from mlomae.hypergrad.partition import view
from mlomae.models import LightMaskingNetwork
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import (
    CoupledReconstruction,
    FrozenReconstruction,
    MloMaeProblem,
    level_losses,
)
from mlomae.recipe import LevelRecipe
from mlomae.training.engines import TrainingLevel, build_level
from tests.hypergrad.brute_force import (
    BruteForceMloMae,
    OptimizerState,
    cosine,
    relative_error,
)
from tests.hypergrad.readings import reduced_gradient
from tests.hypergrad.test_one_step import tiny_models
from tests.ranks import ROOT

BATCH = 8  # per level, over all ranks


def deepspeed_config(
    shipped: str, dtype: str, gradient_clipping: float, micro: int
) -> dict[str, Any]:
    """A shipped configuration, in bf16 as it is or in fp32."""
    config = json.loads((ROOT / "ds_configs" / f"{shipped}.json").read_text())
    config["bf16"]["enabled"] = dtype == "bf16"
    return config | {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // micro,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": gradient_clipping,
    }


def build(
    shipped: str,
    dtype: str,
    optimizer: str,
    gradient_clipping: float = 0.0,
    micro: int = 1,
    dropout: float = 0.0,
    trainable_positions: bool = True,
    coupled: bool = False,
    normalized: bool = False,
    light: bool = False,
    temperature: float = 0.0,
) -> tuple[MloMaeProblem, list[torch.nn.Module]]:
    """The tiny problem on engines, and copies of its untouched models."""
    models = tiny_models(dropout, trainable_positions)
    if light:
        models = (*models[:2], LightMaskingNetwork(16, hidden_dim=8))
    copies = [copy.deepcopy(m) for m in models]
    loss = (CoupledReconstruction if coupled else FrozenReconstruction)(
        "normalized" if normalized else "published"
    )
    losses = level_losses(loss)
    levels: list[TrainingLevel] = []
    for name, model, lr in zip(("pretrain", "classifier", "mask"), models, LRS, strict=True):
        n = micro if name == "pretrain" else 1
        recipe = LevelRecipe(
            batch_size=BATCH,
            lr=lr,
            optimizer=optimizer,
            weight_decay=0.01,
            momentum=0.9,
            eps=EPS,
            decay_norm_and_bias=name == "pretrain",
        )
        config = deepspeed_config(shipped, dtype, gradient_clipping, n)
        levels.append(
            build_level(
                name,
                model,
                recipe,
                config,
                **losses[name]._asdict(),
                total_steps=10**9,
                warmup_steps=0,
            )
        )
    schedule = MaskSchedule(16, temperature=(temperature,) * 2)
    return MloMaeProblem(*levels, estimator=Unrolled(steps=1), schedule=schedule), copies


LRS = (1e-2, 5e-2, 1e-3)
WARM_CYCLES = 3
# Key biases have no gradient but rounding, which Adam divides by eps: 1e-8 would amplify it.
EPS = 1e-4


def batches(cycle: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Global batches of one cycle: pretrain images, classifier and mask images with labels."""
    generator = torch.Generator().manual_seed(100 + cycle)
    images = [torch.randn(BATCH, 3, 8, 8, generator=generator) for _ in range(3)]
    labels = [torch.randint(5, (BATCH,), generator=generator) for _ in range(2)]
    return images[0], images[1], labels[0], images[2], labels[1]


def mine(tensor: Tensor) -> Tensor:
    """This rank's share of a global batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def run_lower(method: MloMaeProblem, cycle: int, micro: int = 1) -> None:
    pretrain, images, labels, *_ = (mine(t) for t in batches(cycle))
    method.pretrain_step(list(pretrain.chunk(micro)))
    method.classifier_step(images, labels)


def hypergradient(method: MloMaeProblem, cycle: int) -> dict[str, Tensor]:
    """Gradient of the mask level at the moment it steps, whole and on every rank."""
    level = method.mask
    gradient: dict[str, Tensor] = {}
    original = level.apply

    def capture() -> None:
        partition = level.partition
        gradient.update(partition.gather(list(partition.shapes), reduced_gradient(partition))[0])
        original()

    level.apply = capture  # type: ignore[method-assign]
    *_, images, labels = (mine(t) for t in batches(cycle))
    method.mask_step(images, labels)
    level.apply = original  # type: ignore[method-assign]
    return {name: value.clone() for name, value in gradient.items()}


def as_problem(
    method: MloMaeProblem, models: list[torch.nn.Module], optimizer: str, clip: float
) -> Any:
    """The engines' present state in float64, for whatever batches and selection come next."""
    states = []
    for level, model, lr in zip(levels_of(method), models, LRS, strict=True):
        partition = level.partition
        names = list(partition.shapes)
        weights = partition.gather(names, partition.weights())[0]
        model.double().load_state_dict({n: w.double() for n, w in weights.items()}, strict=False)
        if level is method.mask:
            continue  # its optimizer takes no part
        state = OptimizerState(
            optimizer, lr, weight_decay=0.01, momentum=0.9, eps=EPS, max_norm=clip
        )
        state.decay_vectors = level is method.pretrain
        keys = ("momentum_buffer",) if optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        entries = [partition.optimizer.state[shard] for shard in partition.shards()]
        moments = partition.gather(names, *([e[k].flatten() for e in entries] for k in keys))
        state.memory = {n: tuple(m[n].double().clone() for m in moments) for n in names}
        state.num_steps = int(entries[0].get("step", 1))
        states.append(state)
    return partial(BruteForceMloMae, *models, *states)


def levels_of(method: MloMaeProblem) -> list[TrainingLevel]:
    return [method.pretrain, method.classifier, method.mask]


def of_all_ranks(tensor: Tensor) -> list[Tensor]:
    """A tensor of every rank, in their order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def against_brute_force(cases: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Relative error and cosine of the engine's hypergradient, in several cycles of each case.

    Some cycles are trained before: with the first AdamW step's moments the derivative is the
    difference of two almost equal numbers, and its rounding would be all that is measured.
    """
    results = []
    for case in cases:
        method, models = build(**case)
        for cycle in range(WARM_CYCLES):
            run_lower(method, cycle, case.get("micro", 1))
            method.clear()
        num_cycles = 3 if case["dtype"] == "bf16" else 1  # single cycles in bf16 are noisy
        cycles = range(WARM_CYCLES, WARM_CYCLES + num_cycles)
        results.append([one_cycle(method, models, cycle, case) for cycle in cycles])
        destroy(method)
    return results


def one_cycle(
    method: MloMaeProblem, models: list[torch.nn.Module], cycle: int, case: dict[str, Any]
) -> dict[str, float]:
    """Train one cycle, and compare its hypergradient with the reference's."""
    problem = as_problem(method, models, case["optimizer"], case.get("gradient_clipping", 0.0))
    run_lower(method, cycle, case.get("micro", 1))
    passes = method.pretrain.records[-1].micro_batches
    images = [part.double() for p in passes for part in of_all_ranks(p.batch.images)]
    coupled, normalized = case.get("coupled", False), case.get("normalized", False)
    places = [p.frozen if coupled else p.frozen.restore for p in passes]
    selection = [part.double() for place in places for part in of_all_ranks(place)]
    _, x2, y2, x3, y3 = batches(cycle)
    labelled = (x2.double(), y2), (x3.double(), y3)
    truth = problem(images, *labelled, selection, coupled, normalized).hypergradient()
    value = hypergradient(method, cycle)
    return {"error": relative_error(value, truth), "cosine": cosine(value, truth)}


def fingerprint(method: MloMaeProblem) -> dict[str, str]:
    """A hash of everything a derivative evaluation must leave alone, by its name."""
    hashes = {"random state": _hash(torch.get_rng_state())}
    for level in (method.pretrain, method.classifier):
        hashes |= fingerprint_of(level) | {f"{level.name} steps": repr(level.num_steps_done)}
    return hashes


def fingerprint_of(level: Level) -> dict[str, str]:
    """The same for one level on an engine."""
    partition, engine, name = level.partition, level.model, level.name
    hashes = {f"{name} weights": _hash(*partition.weights())}
    shards = partition.shards()
    entries = [partition.optimizer.state[shard] for shard in shards]
    memory = [[entry[key].flatten() for entry in entries] for key in ("exp_avg", "exp_avg_sq")]
    vectors = [[shard.flatten() for shard in shards], *memory]
    for kind, vector in zip(("master", "exp_avg", "exp_avg_sq"), vectors, strict=True):
        # By fragments: the padding between them is never initialised.
        hashes[f"{name} {kind}"] = _hash(*(view(vector, f) for f in partition.fragments))
    hashes[f"{name} adam step"] = repr([float(entry["step"]) for entry in entries])
    counters = (
        engine.micro_steps,
        engine.global_steps,
        engine.global_samples,
        engine.skipped_steps,
        engine._is_gradient_accumulation_boundary,
        engine.training,
        getattr(engine.optimizer, "micro_step_id", None),
    )
    hashes[f"{name} counters"] = repr(counters)
    return hashes


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def leaves_no_trace(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """State of the lower levels around a hypergradient, and their future with and without it."""
    results = []
    for case in cases:
        futures = []
        for probe in (False, True):
            method, _ = build(**case, dropout=0.1)
            torch.manual_seed(dist.get_rank())
            run_lower(method, 0)
            before = fingerprint(method)
            if probe:
                hypergradient(method, 0)
                after = fingerprint(method)
            # theta's own step would change the next scores, so only w and C are driven on.
            futures.append(drive_on(method))
            destroy(method)
        results.append({"before": before, "after": after, "futures": futures})
    return results


class FixedScores(FrozenReconstruction):
    """The loss of the lowest level without the masking network."""

    def _losses(self, models: Any, batch: Any, frozen: Any = None) -> tuple[Tensor, Any]:
        return super()._losses({**models, "mask": _rising}, batch)

    def _weights(self, models: Any, choice: Any) -> Tensor:
        return super()._weights({"mask": _rising}, choice)


def _rising(embedding: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.9, embedding.shape[1]).expand(embedding.shape[:2])


def drive_on(method: MloMaeProblem) -> dict[str, str]:
    """Two more steps of the lower levels with fixed scores, then their fingerprint."""
    method.pretrain.loss = FixedScores()
    for cycle in (1, 2):
        run_lower(method, cycle)
    return fingerprint(method)


def same_at_any_world_size(configs: list[str]) -> dict[str, dict[str, Tensor]]:
    """The fp32 hypergradient of the second cycle, after one whole cycle of training."""
    gradients = {}
    for shipped in configs:
        method, _ = build(shipped, "fp32", "adamw")
        run_lower(method, 0)
        hypergradient(method, 0)
        run_lower(method, 1)
        gradients[shipped] = hypergradient(method, 1)
        destroy(method)
    return gradients


def bad_numbers(configs: list[str]) -> dict[str, dict[str, Any]]:
    """What `bad_numbers_with` finds for each configuration."""
    return {shipped: bad_numbers_with(shipped) for shipped in configs}


def bad_numbers_with(shipped: str) -> dict[str, Any]:
    """One rank sees NaN images in a pretrain step: nobody steps, and training goes on."""
    method, _ = build(shipped, "fp32", "adamw")
    before = _hash(*method.pretrain.partition.weights())
    pretrain, images, labels, mask_images, mask_labels = (mine(t) for t in batches(0))
    poisoned = pretrain * float("nan") if dist.get_rank() == 1 else pretrain
    method.pretrain_step([poisoned])
    after = _hash(*method.pretrain.partition.weights())
    method.classifier_step(images, labels)
    mask_before = _hash(*method.mask.partition.weights())
    method.mask_step(mask_images, mask_labels)
    mask_unchanged = mask_before == _hash(*method.mask.partition.weights())
    skipped = (method.pretrain.num_skipped, method.classifier.num_skipped, method.mask.num_skipped)
    run_lower(method, 1)
    hypergradient(method, 1)
    recovered = (method.pretrain.num_skipped, method.mask.num_skipped)
    message = ""
    try:
        for _ in range(3):
            method.pretrain_step([poisoned])
    except RuntimeError as error:
        message = str(error)
    finite = all(bool(s.isfinite().all()) for s in method.pretrain.partition.weights())
    destroy(method)
    return {
        "unchanged": before == after,
        "mask unchanged": mask_unchanged,
        "skipped": skipped,
        "recovered": recovered,
        "finite": finite,
        "message": message,
    }


def destroy(method: MloMaeProblem) -> None:
    for level in (method.pretrain, method.classifier, method.mask):
        level.engine.destroy()
    deepspeed.comm.barrier()
