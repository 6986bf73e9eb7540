"""The exact one-step hypergradient of MLO-MAE against float64 brute force, in one process."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.hypergrad import Level
from mlomae.mlo_mae import MloMae
from mlomae.models import ClassificationHead, MaskedAutoencoder, MaskingNetwork
from tests.hypergrad.brute_force import MloMaeProblem, of_optimizer, relative_error


@dataclass
class PlainLevel:
    """What `TrainingLevel` is to an engine, for a module and a torch optimizer."""

    engine: nn.Module
    level: Level
    max_norm: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        loss.backward()

    def step(self, loss: Tensor) -> bool:
        self.gradients = {n: p.grad.clone() for n, p in self.engine.named_parameters()}
        self.level.optimizer.step()
        self.level.optimizer.zero_grad()
        return True


def tiny_models(
    dropout: float = 0.0, trainable_positions: bool = True
) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(
        image_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=2, num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
        trainable_positions=trainable_positions,
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


def hypergradient_error(kind: str, warm_steps: int) -> float:
    value, reference = hypergradient_of(kind, warm_steps)
    return relative_error(value, reference)


def hypergradient_of(
    kind: str, warm_steps: int, classifier_lr: float = 0.5
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The engine's hypergradient of one cycle, and the reference's."""
    models = [module.double() for module in tiny_models()]
    templates = [copy.deepcopy(module).to("meta") for module in models]
    lrs = (1e-2, classifier_lr if kind != "adamw" else classifier_lr / 10, 1e-3)
    levels = [
        PlainLevel(module, Level(module, make_optimizer(kind, module, lr), template=template))
        for module, lr, template in zip(models, lrs, [*templates[:2], None], strict=True)
    ]
    method = MloMae(*levels)
    generator = torch.Generator().manual_seed(1)

    def images(n: int) -> Tensor:
        return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)

    def labels(n: int) -> Tensor:
        return torch.randint(5, (n,), generator=generator)

    for _ in range(warm_steps):
        method.pretrain_step([images(6)], record=False)
        method.classifier_step(images(6), labels(6), record=False)

    batches = [images(6)], (images(6), labels(6)), (images(4), labels(4))
    states = [of_optimizer(lv.level.optimizer, lv.engine) for lv in levels[:2]]
    problem = MloMaeProblem(*(copy.deepcopy(m) for m in models), *states, *batches)
    reference = problem.hypergradient()

    method.pretrain_step(batches[0], record=True)
    method.classifier_step(*batches[1], record=True)
    method.mask_step(*batches[2])
    return levels[2].gradients, reference
