"""The exact one-step hypergradient of MLO-MAE against float64 brute force, in one process."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import Level, Unrolled
from mlomae.models import (
    ClassificationHead,
    LightMaskingNetwork,
    MaskedAutoencoder,
    MaskingNetwork,
)
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import (
    CoupledReconstruction,
    FrozenReconstruction,
    MloMaeProblem,
    level_losses,
)
from tests.hypergrad.brute_force import BruteForceMloMae, of_optimizer, relative_error


class PlainLevel(Level):
    """What `TrainingLevel` is to an engine, for a module and a torch optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: dict[str, Tensor] = {}
        self.num_steps_done = 0
        self.engine = SimpleNamespace(module=self.model)

    def apply(self) -> None:
        super().apply()
        self.num_steps_done += 1

    def step_with_hypergradient(self, hypergradient: Any) -> None:
        self.gradients = self.named(hypergradient.vector)


def tiny_models(
    dropout: float = 0.0, trainable_positions: bool = True, drop_path_rate: float = 0.0
) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(
        image_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=2, num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
        trainable_positions=trainable_positions, drop_path_rate=drop_path_rate,
    )  # fmt: skip
    return mae, ClassificationHead(16, 5, dropout=dropout), MaskingNetwork(16, 16, 12)


def make_optimizer(kind: str, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(module.parameters(), lr=lr)
    if kind == "momentum":
        return torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)


@pytest.mark.parametrize("warm_steps", [0, 3])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_equals_brute_force(kind: str, warm_steps: int) -> None:
    # float64 moments of a cold start hold values near eps, which costs digits, not correctness.
    error = hypergradient_error(kind, warm_steps)
    assert error <= 1e-10


def test_path_through_the_head_matters() -> None:
    with_head, without = (hypergradient_of("adamw", 3, classifier_lr=lr)[0] for lr in (0.5, 0.0))
    # The path through the head is not a rounding error of the direct one.
    assert relative_error(without, with_head) > 0.05


@pytest.mark.parametrize("keep_activations", [True, False])
def test_activation_checkpointing_changes_nothing(keep_activations: bool) -> None:
    value, reference = hypergradient_of(
        "adamw", 3, checkpointing=True, keep_activations=keep_activations
    )
    assert relative_error(value, reference) <= 1e-10


VARIANTS: dict[str, dict[str, Any]] = {
    "coupled": {"coupled": True},
    "normalized": {"normalized": True},
    "coupled and normalized": {"coupled": True, "normalized": True},
    "drawn": {"temperature": 1.5},
    "coupled and drawn": {"coupled": True, "temperature": 1.5},
    "light": {"light": True},
    "light, coupled, normalized, drawn": {
        "light": True, "coupled": True, "normalized": True, "temperature": 0.7,
    },
    "ratio": {"mask_ratio": (0.75, 0.25)},
    "dropped paths": {"drop_path_rate": 0.5},
    "coupled, dropped paths": {"coupled": True, "drop_path_rate": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_masking_equals_brute_force(variant: str) -> None:
    value, reference = hypergradient_of("adamw", 3, **VARIANTS[variant])
    assert relative_error(value, reference) <= 1e-10


def test_coupling_and_weighting_are_not_the_same_thing() -> None:
    variants = ("coupled", "normalized", "coupled and normalized")
    values = [hypergradient_of("adamw", 3, **VARIANTS[v])[0] for v in variants]
    values.append(hypergradient_of("adamw", 3)[0])
    for i, one in enumerate(values):
        assert all(relative_error(one, other) > 1e-2 for other in values[i + 1 :])


def hypergradient_error(kind: str, warm_steps: int) -> float:
    value, reference = hypergradient_of(kind, warm_steps)
    return relative_error(value, reference)


def hypergradient_of(
    kind: str,
    warm_steps: int,
    classifier_lr: float = 0.5,
    checkpointing: bool = False,
    keep_activations: bool = True,
    coupled: bool = False,
    normalized: bool = False,
    light: bool = False,
    temperature: float = 0.0,
    mask_ratio: tuple[float, float] = (0.75, 0.75),
    drop_path_rate: float = 0.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The engine's hypergradient of one cycle, and the reference's."""
    models = [module.double() for module in tiny_models(drop_path_rate=drop_path_rate)]
    if light:
        models[2] = LightMaskingNetwork(16, hidden_dim=8).double()
    models[0].activation_checkpointing = checkpointing
    lrs = (1e-2, classifier_lr if kind != "adamw" else classifier_lr / 10, 1e-3)
    loss = (CoupledReconstruction if coupled else FrozenReconstruction)(
        "normalized" if normalized else "published"
    )
    losses = level_losses(loss)
    levels = [
        PlainLevel(name, module, make_optimizer(kind, module, lr), **losses[name]._asdict())
        for name, module, lr in zip(losses, models, lrs, strict=True)
    ]
    method = MloMaeProblem(
        *levels,
        estimator=Unrolled(steps=1),
        keep_activations=keep_activations,
        schedule=MaskSchedule(16, mask_ratio, (temperature,) * 2, warm_steps + 1, seed=3),
    )
    generator = torch.Generator().manual_seed(1)

    def images(n: int) -> Tensor:
        return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)

    def labels(n: int) -> Tensor:
        return torch.randint(5, (n,), generator=generator)

    for _ in range(warm_steps):
        method.pretrain_step([images(6)])
        method.classifier_step(images(6), labels(6))
        method.clear()

    batches = [images(6)], (images(6), labels(6)), (images(4), labels(4))
    states = [of_optimizer(lv.optimizer, lv.model) for lv in levels[:2]]
    problem = BruteForceMloMae(*(copy.deepcopy(m) for m in models), *states, *batches)
    problem.mae.activation_checkpointing = False
    problem.coupled, problem.normalized = coupled, normalized
    problem.mae.num_keep = method.schedule.num_keep(method.pretrain.num_steps_done)
    problem.seed = 11
    torch.manual_seed(11)
    method.pretrain_step(batches[0])
    if temperature:
        problem.selection = [loss.choice.restore.double()]
        assert not torch.equal(loss.choice.restore, ranks_of(loss.choice.scores))
    reference = problem.hypergradient()

    method.classifier_step(*batches[1])
    method.mask_step(*batches[2])
    return levels[2].gradients, reference


def ranks_of(scores: Tensor) -> Tensor:
    """Each patch's place among the scores of its image [B, N]."""
    return scores.argsort(dim=1).argsort(dim=1)
