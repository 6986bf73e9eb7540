"""The small problem of `mlomae gradcheck`: a reduced recipe, random images, the float64 truth."""

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mlomae.distributed.collectives import gather_objects
from mlomae.hypergrad.losses import Loss, Models, ReplayedLoss, WeightedLoss
from mlomae.hypergrad.randomness import RandomState, restored
from mlomae.hypergrad.records import MicroBatch
from mlomae.hypergrad.reference import OptimizerRules, ReferenceLevel, hypergradient, to_double
from mlomae.models.classifier import ClassificationHead
from mlomae.models.mae import num_kept
from mlomae.pretraining.mlo_mae import HEAD_LOSSES, UNLABELLED
from mlomae.pretraining.networks import BUILDERS
from mlomae.pretraining.program import losses_of
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.randomness import derive_seed
from mlomae.recipe import ModelRecipe
from mlomae.recipe.section import flatten
from mlomae.training.engines import TrainingLevel, build_optimizer

BATCH = 16
LARGEST = {"depth": 2, "decoder_depth": 1, "num_heads": 4, "decoder_num_heads": 4, "patch_size": 4}
HEAD_WIDTH, DECODER_HEAD_WIDTH = 16, 8
GRID = 4  # patches per side
HIDDEN_DIM = 32
NUM_CLASSES = 10

LOWER = ("pretrain", "classifier")

NamedTensors = dict[str, Tensor]
Labelled = tuple[Tensor, Tensor]  # images [B, 3, H, W] and labels [B] or masks [B, H, W]


def reduce_recipe(recipe: PretrainingRecipe, world_size: int) -> PretrainingRecipe:
    """The same mathematics at a size that float64 can unroll in a moment.

    Kept: levels, optimizers, clipping, accumulation, steps per cycle, masking ratio, loss, dropout
    and the section `hypergradient`. Learning rates stay at their peak.
    """
    values = recipe.model_dump() | {"init_from": (), "init_from_expected": ()}
    values["model"] |= _reduced_model(recipe)
    values["masking"]["hidden_dim"] = min(recipe.masking.hidden_dim, HIDDEN_DIM)
    values["masking"] |= {"mask_ratio_end": None, "temperature_end": None}  # never reached here
    labels = values["data"] if recipe.downstream is None else values["downstream"]
    labels["num_classes"] = min(recipe.labelled.num_classes, NUM_CLASSES)
    for name, level in recipe.levels.items():
        parts = world_size * level.gradient_accumulation_steps
        size = -(-min(level.batch_size, BATCH) // parts) * parts
        values[name] |= {"batch_size": size, "base_lr": None, "warmup_epochs": 0.0}
    return PretrainingRecipe.model_validate(values)


def _reduced_model(recipe: PretrainingRecipe) -> dict[str, Any]:
    model = recipe.model
    sizes = {key: min(getattr(model, key), most) for key, most in LARGEST.items()}
    width = sizes["num_heads"] * HEAD_WIDTH
    decoder_width = sizes["decoder_num_heads"] * DECODER_HEAD_WIDTH
    if model.embed_dim <= width:
        width, sizes["num_heads"] = model.embed_dim, model.num_heads
    if model.decoder_embed_dim <= decoder_width:
        decoder_width, sizes["decoder_num_heads"] = model.decoder_embed_dim, model.decoder_num_heads
    image_size = _side(model, recipe.masking.mask_ratio) * sizes["patch_size"]
    widths = {"embed_dim": width, "decoder_embed_dim": decoder_width}
    # dropped paths and compiled code draw and round otherwise in float64
    plain = {"drop_path_rate": 0.0, "compile_blocks": False}
    return sizes | widths | plain | {"preset": None, "image_size": image_size}


def _side(model: ModelRecipe, mask_ratio: float) -> int:
    """Patches per side: few, but of them some are kept and some hidden."""
    longest = max(model.grid_size)
    for side in range(min(GRID, longest), longest):
        if 0 < num_kept(side**2, mask_ratio) < side**2:
            return side
    return longest


def reduce_config(config: dict[str, Any], recipe: PretrainingRecipe) -> dict[str, Any]:
    """A DeepSpeed JSON for a reduced recipe: its batches, and buckets no larger than the model."""
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu")
    config = {key: value for key, value in config.items() if key not in batches}
    num_weights = sum(p.numel() for p in BUILDERS["pretrain"](recipe).parameters())
    zero = dict(config.get("zero_optimization", {}))
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if isinstance(zero.get(key), int | float):
            zero[key] = min(zero[key], num_weights)
    return config | {"zero_optimization": zero}


def list_reductions(recipe: PretrainingRecipe, reduced: PretrainingRecipe) -> list[str]:
    """What differs, as `key old -> new`."""
    before = dict(flatten(recipe.model_dump()))
    after = dict(flatten(reduced.model_dump()))
    unset = ("model.preset", "base_lr")
    changed = [k for k in before if before[k] != after.get(k) and not k.endswith(unset)]
    return [f"{key} {before[key]} -> {after[key]}" for key in changed]


class RandomBatches:
    """This rank's share of a cycle's random batches, which are the same for any number of ranks."""

    def __init__(self, recipe: PretrainingRecipe, cycle: int, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._generator = torch.Generator().manual_seed(derive_seed(recipe.seed, cycle))

    def micro_batches(self) -> list[Tensor]:
        """Images of one encoder step."""
        num = self._recipe.pretrain.gradient_accumulation_steps
        return list(self._images("pretrain").chunk(num))

    def labelled(self, level: str) -> Labelled:
        """Images and labels of a step of another level; in masks a fifth of the pixels has none."""
        images = self._images(level)
        labelled, size = self._recipe.labelled, self._recipe.levels[level].batch_size
        is_class = labelled.task == "classification"
        shape = (size,) if is_class else (size, *self._recipe.model.image_size)
        labels = torch.randint(labelled.num_classes, shape, generator=self._generator)
        if not is_class:
            labels[torch.rand(shape, generator=self._generator) < 0.2] = UNLABELLED
        return images, self._mine(labels)

    def _images(self, level: str) -> Tensor:
        shape = (self._recipe.levels[level].batch_size, 3, *self._recipe.model.image_size)
        return self._mine(torch.randn(shape, generator=self._generator))

    def _mine(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(dist.get_world_size())[dist.get_rank()].to(self._device)


class Truth:
    """Follows the lower levels through a cycle, and differentiates their steps in float64.

    The batches of all ranks are the micro-batches of the reference's steps. The state is the
    engines': weights in compute precision, the optimizer's memory in float32.
    """

    def __init__(self, recipe: PretrainingRecipe, levels: Mapping[str, TrainingLevel]) -> None:
        # A block that is computed again would not find the reference's weights.
        model = recipe.model.model_copy(update={"activation_checkpointing": False})
        self._recipe = recipe.model_copy(update={"model": model})
        self._head_loss = HEAD_LOSSES[recipe.labelled.task]
        self._levels = levels
        self._device = levels["pretrain"].engine.device
        self._before = {n: deque[Any](maxlen=lv.num_steps) for n, lv in levels.items()}

    def note(self, level: TrainingLevel) -> None:
        """Remember a level's state before its next step. All ranks must call."""
        self._before[level.name].append((_weights(level), _memory(level)))

    def hypergradient(self, steps: Mapping[str, int], batch: Any) -> NamedTensors:
        """The derivative of the mask level's loss. All ranks must call.

        Args:
            steps: how many of the newest steps of each lower level to go back through.
            batch: this rank's images and labels of the mask level.
        """
        levels = [self._lower(name, num) for name, num in steps.items()]

        def validation_loss(models: Models, batch: Any) -> Tensor:
            levels[1].module.eval()  # as in training, it sees no dropout
            return self._head_loss(models, batch)

        target = self._module("mask", _weights(self._levels["mask"]))
        levels.append(ReferenceLevel("mask", target, validation_loss, [self._of_all_ranks(batch)]))
        with restored(self._device):
            return hypergradient(levels, "mask")

    def _lower(self, name: str, num_steps: int) -> ReferenceLevel:
        weights, memory = self._before[name][-num_steps]
        module = self._module(name, weights)
        recipe = self._recipe.levels[name]
        optimizer = build_optimizer(module, recipe)
        rules = OptimizerRules.of(optimizer, module, recipe.gradient_clipping)
        rules.memory = memory
        is_first = name == "pretrain"
        loss = _PretrainLoss(self._recipe) if is_first else _ClassifierLoss(self._head_loss)
        records = list(self._levels[name].records)[-num_steps:]
        batches = [[m for part in r.micro_batches for m in self._passes(part)] for r in records]
        return ReferenceLevel(name, module, loss, batches, rules)

    def _module(self, name: str, weights: NamedTensors) -> nn.Module:
        module = BUILDERS[name](self._recipe).to(self._device).double()
        module.load_state_dict(weights, strict=False)  # fixed positions are no weights
        if isinstance(module, ClassificationHead):
            module.dropout = SameDraws(module.dropout.p, self._levels["classifier"].dtype)
        return module

    def _passes(self, micro_batch: MicroBatch) -> list[Any]:
        """A micro-batch of every rank, with what was frozen and drawn there."""
        return self._of_all_ranks((micro_batch.batch, micro_batch.frozen, micro_batch.random_state))

    def _of_all_ranks(self, value: Any) -> list[Any]:
        """A value of every rank, in their order, on this rank's device."""
        values = gather_objects(_moved(value, torch.device("cpu")))
        return [_moved(other, self._device) for other in values]


def _weights(level: TrainingLevel) -> NamedTensors:
    weights: NamedTensors = to_double(level.named(level.partition.weights()))
    return weights


def _memory(level: TrainingLevel) -> dict[str, Any]:
    """What the optimizer remembers of each parameter; nothing before the first step."""
    partition = level.partition
    entries = [partition.optimizer.state.get(shard, {}) for shard in partition.shards()]
    keys = [key for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in entries[0]]
    if not keys:
        return {}
    vectors = [[entry[key].flatten() for entry in entries] for key in keys]
    whole = to_double(partition.gather(list(partition.shapes), *vectors))
    step = float(entries[0].get("step", 0))
    return {
        name: {"step": step} | {key: w[name] for key, w in zip(keys, whole, strict=True)}
        for name in partition.shapes
    }


class _PretrainLoss:
    """The recipe's reconstruction loss, with the masks of the step that was taken."""

    def __init__(self, recipe: PretrainingRecipe) -> None:
        self.loss = losses_of(recipe)["pretrain"].loss

    def __call__(self, models: Models, batch: Any) -> Tensor:
        masked, frozen, random_state = batch
        random_state.restore()
        if isinstance(self.loss, ReplayedLoss):
            return self.loss.loss(models, masked, frozen)[0]
        assert isinstance(self.loss, WeightedLoss)
        losses, frozen = self.loss.losses(models, masked, frozen)
        return (self.loss.weights(models, frozen) * losses).sum()


class _ClassifierLoss:
    """The loss of the head, with the dropout of the step that was taken."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, models: Models, batch: Any) -> Tensor:
        labelled, _, random_state = batch
        random_state.restore()
        return self.loss(models, labelled)


class SameDraws(nn.Dropout):
    """Dropout in float64 that hides what it hid in another precision.

    On CUDA the same random state yields other draws in float64.
    """

    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__(p)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        ones = torch.ones(input.shape, dtype=self.dtype, device=input.device)
        return input * (F.dropout(ones, self.p) != 0) / (1 - self.p)


def _moved(value: Any, device: torch.device) -> Any:
    """A nest of tuples and lists with its tensors on a device; random states are set there, too."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        return dataclasses.replace(leaf, index=device) if isinstance(leaf, RandomState) else leaf

    return tree_map(move, value)
