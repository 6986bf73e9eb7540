"""The hypergradient of MLO-MAE with segmentation as the upper levels, against brute force."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mlomae.hypergrad import Unrolled
from mlomae.models import MaskedAutoencoder, MaskingNetwork, SegmentationHead
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.mlo_mae import (
    HEAD_LOSSES,
    UNLABELLED,
    FrozenReconstruction,
    LevelLoss,
    MloMaeProblem,
    level_losses,
)
from mlomae.recipe import LevelRecipe
from mlomae.training.engines import build_level
from tests.hypergrad import engine_cases
from tests.hypergrad.brute_force import BruteForceMloMae, Weights, of_optimizer, relative_error
from tests.hypergrad.engine_cases import BATCH, EPS, LRS, WARM_CYCLES
from tests.hypergrad.test_one_step import PlainLevel, make_optimizer
from tests.ranks import run_ranks

SIZE = (6, 10)  # pixels: 3 rows and 5 columns of patches
NUM_CLASSES = 4
NAMES = ("pretrain", "classifier", "mask")

Labelled = tuple[Tensor, Tensor]


def models_of(dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(
        image_size=SIZE, patch_size=2, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8,
        decoder_depth=1, decoder_num_heads=2, trainable_positions=True,
    )  # fmt: skip
    return [mae, SegmentationHead(16, NUM_CLASSES, dropout), MaskingNetwork(15, 16, 12)]


def losses() -> dict[str, LevelLoss]:
    return level_losses(FrozenReconstruction(), HEAD_LOSSES["segmentation"])


def labelled(num: int, generator: torch.Generator) -> Labelled:
    """Images in float64, and masks in which a third of the pixels and one image have no class."""
    images = torch.randn(num, 3, *SIZE, generator=generator, dtype=torch.float64)
    masks = torch.randint(NUM_CLASSES, (num, *SIZE), generator=generator)
    masks[torch.rand(num, *SIZE, generator=generator) < 1 / 3] = UNLABELLED
    masks[0] = UNLABELLED
    return images, masks


class SegmentationProblem(BruteForceMloMae):
    """The loss of the upper levels written out; a batch is a list of images and one of masks."""

    def _classifier_loss(
        self, weights: Weights, head: Weights, images: list[Tensor], masks: list[Tensor]
    ) -> Tensor:
        parts = zip(images, masks, strict=True)
        return torch.stack([self._loss_of_rank(weights, head, *part) for part in parts]).mean()

    def _loss_of_rank(
        self, weights: Weights, head: Weights, images: Tensor, masks: Tensor
    ) -> Tensor:
        prefixed = {f"mae.{name}": weight for name, weight in weights.items()}
        tokens = functional_call(_Tokens(self.mae), prefixed, (images,))
        normed = F.layer_norm(tokens, (16,), head["norm.weight"], head["norm.bias"], 1e-6)
        logits = normed @ head["head.weight"].T + head["head.bias"]
        grid = logits.reshape(len(images), 3, 5, NUM_CLASSES)  # patches in rows, as one reads
        down, across = resizing(3, SIZE[0]), resizing(5, SIZE[1])
        pixels = torch.einsum("hr,wc,brck->bhwk", down, across, grid)
        losses = [
            pixels[place].logsumexp(0) - pixels[place][masks[place]]
            for place in map(tuple, (masks != UNLABELLED).nonzero().tolist())
        ]
        return torch.stack(losses).mean() if losses else pixels.sum() * 0


class _Tokens(nn.Module):
    def __init__(self, mae: nn.Module) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.mae.forward_features(images)
        return tokens[:, 1:]


def resizing(num: int, length: int) -> Tensor:
    """Weights [length, num] of bilinear resizing between the centres of pixels."""
    matrix = torch.zeros(length, num, dtype=torch.float64)
    for i in range(length):
        place = min(max((i + 0.5) * num / length - 0.5, 0), num - 1)
        low = min(int(place), num - 2)
        matrix[i, low] += 1 - (place - low)
        matrix[i, low + 1] += place - low
    return matrix


# --- one process, float64 ----------------------------------------------------------------------


@pytest.mark.parametrize("keep_activations", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_equals_brute_force(kind: str, keep_activations: bool) -> None:
    value, truth = alone(kind, keep_activations)
    assert relative_error(value, truth) <= 1e-10


def test_path_through_the_head_matters() -> None:
    (with_head, _), (without, _) = (alone("sgd", True, lr) for lr in (0.5, 0.0))
    assert relative_error(without, with_head) > 0.05


def test_pixels_without_a_class_teach_nothing() -> None:
    """A batch of them alone moves neither mask nor head, and is no NaN."""
    _, truth = alone("sgd", True)
    value, _ = alone("sgd", True, mask_labels=UNLABELLED)
    assert all(bool((gradient == 0).all()) for gradient in value.values())
    assert any(bool((gradient != 0).any()) for gradient in truth.values())


def alone(
    kind: str, keep_activations: bool, head_lr: float = 0.05, mask_labels: int | None = None
) -> tuple[Weights, Weights]:
    """The hypergradient of the fourth cycle, and the reference's."""
    models = [module.double() for module in models_of()]
    levels = [
        PlainLevel(name, module, make_optimizer(kind, module, lr), **losses()[name]._asdict())
        for name, module, lr in zip(NAMES, models, (1e-2, head_lr, 1e-3), strict=True)
    ]
    method = MloMaeProblem(
        *levels,
        estimator=Unrolled(steps=1),
        schedule=MaskSchedule(15),
        keep_activations=keep_activations,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(WARM_CYCLES):
        method.pretrain_step([labelled(6, generator)[0]])
        method.classifier_step(*labelled(6, generator))
        method.clear()
    images, below, above = (labelled(n, generator) for n in (6, 6, 4))
    if mask_labels is not None:
        above[1][:] = mask_labels
    states = [of_optimizer(level.optimizer, level.model) for level in levels[:2]]
    copies = [copy.deepcopy(module) for module in models]
    batches = [[part] for part in below], [[part] for part in above]
    truth = SegmentationProblem(*copies, *states, [images[0]], *batches)
    method.pretrain_step([images[0]])
    method.classifier_step(*below)
    method.mask_step(*above)
    return levels[2].gradients, truth.hypergradient()


# --- two ranks on engines ----------------------------------------------------------------------

CASES = {
    ("zero0_bf16", "fp32"): 1e-5,
    ("zero2_bf16", "fp32"): 1e-5,
    ("zero3_bf16", "fp32"): 1e-5,
    ("zero3_bf16", "bf16"): 5e-2,
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    folder = tmp_path_factory.mktemp("downstream")
    ranks = run_ranks(f"{__name__}:errors_on_engines", 2, folder, cases=list(CASES))
    assert ranks[0] == ranks[1]
    return dict(zip(CASES, ranks[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_engines_equal_brute_force(errors: Any, case: tuple[str, str]) -> None:
    assert errors[case] <= CASES[case]


def errors_on_engines(cases: list[tuple[str, str]]) -> list[float]:
    """The relative error of each case. One rank's last masks for the head have no class at all."""
    return [_error_on_engines(*case) for case in cases]


def _error_on_engines(shipped: str, dtype: str) -> float:
    models = models_of()
    copies = [copy.deepcopy(module) for module in models]
    levels = []
    for name, module, lr in zip(NAMES, models, LRS, strict=True):
        recipe = LevelRecipe(
            batch_size=BATCH, lr=lr, weight_decay=0.01, eps=EPS,
            decay_norm_and_bias=name == "pretrain",
        )  # fmt: skip
        config = engine_cases.deepspeed_config(shipped, dtype, 0.0, 1)
        more = losses()[name]._asdict() | {"total_steps": 10**9, "warmup_steps": 0}
        levels.append(build_level(name, module, recipe, config, **more))
    method = MloMaeProblem(*levels, estimator=Unrolled(steps=1), schedule=MaskSchedule(15))
    for cycle in range(WARM_CYCLES):
        _run_lower(method, cycle)
        method.clear()
    problem = engine_cases.as_problem(method, copies, "adamw", 0.0)
    _run_lower(method, WARM_CYCLES)
    (passed,) = method.pretrain.records[-1].micro_batches
    selection = [part.double() for part in engine_cases.of_all_ranks(passed.frozen.restore)]
    images = [part.double() for part in engine_cases.of_all_ranks(passed.batch.images)]
    _, below, above = _batches(WARM_CYCLES)
    halves = [tuple(list(part.chunk(2)) for part in batch) for batch in (below, above)]
    truth = SegmentationProblem(*problem.args, images, *halves, selection=selection).hypergradient()
    value: Weights = {}
    method.mask.step_with_hypergradient = lambda h: value.update(method.mask.named(h.vector))  # type: ignore[method-assign,assignment]
    method.mask_step(*_mine(above))
    engine_cases.destroy(method)
    return relative_error(value, truth)


def _run_lower(method: MloMaeProblem, cycle: int) -> None:
    images, below, _ = _batches(cycle)
    method.pretrain_step([engine_cases.mine(images).float()])
    method.classifier_step(*_mine(below))


def _batches(cycle: int) -> tuple[Tensor, Labelled, Labelled]:
    """Global batches: of the encoder, the head and the mask. The second half of the head's, which
    one rank gets, has no class in the last cycle."""
    generator = torch.Generator().manual_seed(100 + cycle)
    images, below, above = (labelled(BATCH, generator) for _ in range(3))
    if cycle == WARM_CYCLES:
        below[1][BATCH // 2 :] = UNLABELLED
    return images[0], below, above


def _mine(batch: Labelled) -> Labelled:
    images, masks = map(engine_cases.mine, batch)
    return images.float(), masks
