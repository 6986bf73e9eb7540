"""Small multilevel problems that the engine and the reference are both built from.

Each factory gives a `Problem`: levels, lowest first, each with a module and a loss. Everything is
smooth and a function of the weights alone, so that slopes taken from reruns of the training can be
compared. Attention has no key bias: softmax ignores it, hence its gradient is rounding alone, which
Adam would blow up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

NUM_TOKENS, NUM_INPUTS, WIDTH, NUM_CLASSES, BATCH = 3, 5, 8, 3, 4
Batch = tuple[Tensor, Tensor]
Models = Mapping[str, Callable[..., Any]]
Loss = Callable[[Models, Any], Tensor]


@dataclass(frozen=True)
class LevelSpec:
    """What both an engine's level and a reference's level are made from."""

    name: str
    module: nn.Module
    loss: Loss
    lower: tuple[str, ...] = ()
    upper: tuple[str, ...] = ()
    num_steps: int = 1
    settings: Callable[[Models], list[dict[str, Tensor]]] | None = None


@dataclass(frozen=True)
class Problem:
    """Levels, lowest first; the last one is the target."""

    levels: tuple[LevelSpec, ...]
    dtype: torch.dtype

    @property
    def lower(self) -> tuple[LevelSpec, ...]:
        return self.levels[:-1]

    @property
    def target(self) -> LevelSpec:
        return self.levels[-1]

    def batch(self, generator: Generator, size: int = BATCH) -> Batch:
        """Tokens [size, NUM_TOKENS, NUM_INPUTS] and labels [size] for any level's loss."""
        # Drawn in float32, for the same numbers in every precision.
        tokens = torch.randn(size, NUM_TOKENS, NUM_INPUTS, generator=generator)
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        return tokens.to(self.dtype), labels


# --- modules ---------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block: attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, dropout: float = 0.0, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(attended))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Backbone(nn.Module):
    """Tokens [B, T, NUM_INPUTS] to features [B, T, WIDTH] and outputs [B, T, num_outputs]."""

    def __init__(self, num_outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(NUM_INPUTS, WIDTH), Block(dropout)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_outputs)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(self.block(self.embed(tokens)))
        return features, self.last(features)


class Head(nn.Module):
    """Features [B, T, WIDTH] to class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(self.norm(features).mean(1))


class Weighter(nn.Module):
    """A weight in (0, 2) for each vector in the last dimension."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(num_inputs, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.fc2(torch.tanh(self.fc1(x)))).squeeze(-1)


class Rates(nn.Module):
    """Learning rate and weight decay of each parameter group, as exponentials."""

    def __init__(self, lrs: Sequence[float], decays: Sequence[float]) -> None:
        super().__init__()
        self.log_lr = nn.Parameter(torch.tensor(lrs, dtype=torch.float64).log())
        self.log_decay = nn.Parameter(torch.tensor(decays, dtype=torch.float64).log())

    def forward(self) -> list[dict[str, Tensor]]:
        pairs = zip(self.log_lr.exp(), self.log_decay.exp(), strict=True)
        return [{"lr": lr, "weight_decay": decay} for lr, decay in pairs]


# --- losses ----------------------------------------------------------------------------------


def class_losses(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels, reduction="none")


def class_loss(models: Models, batch: Batch) -> Tensor:
    """Cross-entropy of the level "train"."""
    tokens, labels = batch
    return class_losses(models["train"](tokens)[1].mean(1), labels).mean()


def sample_losses(models: Models, batch: Batch, frozen: Any = None) -> tuple[Tensor, Tensor]:
    """The terms of that loss, and what their weights are read from."""
    tokens, labels = batch
    losses = class_losses(models["train"](tokens)[1].mean(1), labels) / len(labels)
    return losses, tokens.flatten(1)


def sample_weights(models: Models, frozen: Tensor) -> Tensor:
    return models["theta"](frozen)


def weighted_loss(models: Models, batch: Batch) -> Tensor:
    losses, frozen = sample_losses(models, batch)
    return (sample_weights(models, frozen) * losses).sum()


def coupled_loss(models: Models, batch: Batch) -> Tensor:
    """Weights that read the features themselves, nothing detached."""
    features, outputs = models["train"](batch[0])
    return (models["theta"](features.mean(1)) * class_losses(outputs.mean(1), batch[1])).mean()


def reconstruction_loss(models: Models, batch: Batch) -> Tensor:
    tokens = batch[0]
    errors = (models["w"](tokens)[1] - tokens).square().mean(-1)
    return (models["theta"](tokens) * errors).mean()


def head_loss(name: str, scale: float = 1.0, weighted: bool = False) -> Loss:
    """Cross-entropy of one head on the features of "w", which different heads see scaled."""

    def loss(models: Models, batch: Batch) -> Tensor:
        tokens, labels = batch
        losses = class_losses(models[name](models["w"](tokens)[0] * scale), labels)
        return (losses * models["theta"](tokens).mean(1) if weighted else losses).mean()

    return loss


def top_loss(*heads: str, penalty: float = 0.0) -> Loss:
    """Sum of the heads' cross-entropies, and a direct function of "theta"."""

    def loss(models: Models, batch: Batch) -> Tensor:
        tokens, labels = batch
        features = models["w"](tokens)[0]
        total = sum(class_losses(models[name](features), labels).mean() for name in heads)
        return total + penalty * models["theta"](tokens).square().mean() if penalty else total

    return loss


# --- problems --------------------------------------------------------------------------------


def chain2(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Problem:
    """A classifier whose samples are weighted by the level above."""
    torch.manual_seed(0)
    train, theta = Backbone(NUM_CLASSES, dropout), Weighter(NUM_TOKENS * NUM_INPUTS)
    return problem_of(
        dtype,
        LevelSpec("train", train, weighted_loss, upper=("theta",)),
        LevelSpec("theta", theta, class_loss, lower=("train",)),
    )


def chain3(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Problem:
    """As MLO-MAE without images: a backbone, a head on its features, weights of its errors."""
    torch.manual_seed(0)
    w, head, theta = Backbone(NUM_INPUTS, dropout), Head(), Weighter(NUM_INPUTS)
    return problem_of(
        dtype,
        LevelSpec("w", w, reconstruction_loss, upper=("theta",)),
        LevelSpec("head", head, head_loss("head"), lower=("w",)),
        LevelSpec("theta", theta, top_loss("head", penalty=0.005), lower=("w", "head")),
    )


def diamond(dtype: torch.dtype = torch.float64) -> Problem:
    """Two heads on one backbone, and the uppermost level on both."""
    torch.manual_seed(0)
    w, theta = Backbone(NUM_INPUTS), Weighter(NUM_INPUTS)
    return problem_of(
        dtype,
        LevelSpec("w", w, reconstruction_loss, upper=("theta",)),
        LevelSpec("head1", Head(), head_loss("head1"), lower=("w",)),
        LevelSpec("head2", Head(), head_loss("head2", scale=0.5), lower=("w",)),
        LevelSpec("theta", theta, top_loss("head1", "head2"), lower=("w", "head1", "head2")),
    )


def settings(dtype: torch.dtype = torch.float64) -> Problem:
    """Learning rate and decay of the two groups of `make_optimizer` are the level above."""
    torch.manual_seed(0)
    train, rates = Backbone(NUM_CLASSES), Rates([0.02, 0.04], [0.05, 0.02])
    return problem_of(
        dtype,
        LevelSpec("train", train, class_loss, upper=("rates",), settings=lambda m: m["rates"]()),
        LevelSpec("rates", rates, class_loss, lower=("train",)),
    )


def coupled(dtype: torch.dtype = torch.float64) -> Problem:
    """The level above reads activations that depend on the lower level's own weights."""
    torch.manual_seed(0)
    train, theta = Backbone(NUM_CLASSES), Weighter(WIDTH)
    return problem_of(
        dtype,
        LevelSpec("train", train, coupled_loss, upper=("theta",)),
        LevelSpec("theta", theta, class_loss, lower=("train",)),
    )


def shared(dtype: torch.dtype = torch.float64) -> Problem:
    """The uppermost level stands in the losses of both levels below."""
    torch.manual_seed(0)
    w, head, theta = Backbone(NUM_INPUTS), Head(), Weighter(NUM_INPUTS)
    loss = head_loss("head", weighted=True)
    return problem_of(
        dtype,
        LevelSpec("w", w, reconstruction_loss, upper=("theta",)),
        LevelSpec("head", head, loss, lower=("w",), upper=("theta",)),
        LevelSpec("theta", theta, top_loss("head"), lower=("w", "head")),
    )


def problem_of(dtype: torch.dtype, *levels: LevelSpec) -> Problem:
    """The problem in a precision; its weights are drawn in float32 whatever that is."""
    for level in levels:
        level.module.to(dtype)
    return Problem(levels, dtype)


PROBLEMS = {f.__name__: f for f in (chain2, chain3, diamond, settings, coupled, shared)}

# --- optimizers ------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (
        torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02}
    ),
    "nesterov": (
        torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}
    ),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.02}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.05}),
}  # fmt: skip


def make_optimizer(kind: str, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with two groups, matrices and vectors; the latter move faster and decay less."""
    cls, options = OPTIMIZERS[kind]
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    faster = {"lr": 2 * options["lr"], "weight_decay": options["weight_decay"] / 2}
    return cls([{"params": matrices}, {"params": vectors, **faster}], **options)
