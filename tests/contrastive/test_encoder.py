"""The cut encoder and its learning rates, and the averaged projector, in one process."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mlomae.contrastive.encoder import (
    FrozenEncoder,
    LowerEncoder,
    TunedEncoder,
    UpperEncoder,
    tuned_param_groups,
)
from mlomae.contrastive.program import build_target
from mlomae.contrastive.recipe import MaeCtRecipe, TuneRun
from mlomae.contrastive.target import TargetProjector
from mlomae.models.contrastive import NnclrHead
from mlomae.recipe import load_recipe

PUBLISHED = {"base_patch16": 0.075, "large_patch16": 0.0057, "huge_patch16": 0.0010}
PUBLISHED |= {"huge_patch14": 0.0010}


def small_vit(global_pool: str = "token") -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(
        8, 2, embed_dim=16, depth=4, num_heads=2, num_classes=0, fc_norm=False,
        global_pool=global_pool,
    )  # fmt: skip
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("num_lower", [0, 1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_both_parts_together_are_the_vit_of_timm(
    global_pool: str, num_lower: int, recompute: bool
) -> None:
    vit, images = small_vit(global_pool), torch.randn(3, 3, 8, 8)
    expected = vit(images)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in vit.named_parameters()}
    vit.zero_grad()
    vit.set_grad_checkpointing(recompute)
    torch.testing.assert_close(FrozenEncoder(vit)(images), expected.detach())

    for parameter in vit.parameters():
        parameter.requires_grad_()
    lower, upper = LowerEncoder(vit, num_lower), UpperEncoder(vit, num_lower)
    names = [*lower.state_dict(), *upper.state_dict()]
    assert sorted(names) == sorted(vit.state_dict())
    features = upper.train()(lower.train()(images))
    torch.testing.assert_close(features, expected)
    features.square().sum().backward()
    assert not any(p.requires_grad for p in lower.parameters())
    assert not any(module.training for module in lower.modules())
    for name, parameter in upper.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_views_of_a_tuned_encoder_are_embedded_one_by_one() -> None:
    vit, images = small_vit("avg"), torch.randn(2, 5, 3, 8, 8)
    tuned = TunedEncoder(UpperEncoder(vit, 2), NnclrHead(16, 8, 4, 8))
    tokens = torch.stack([LowerEncoder(vit, 2)(view) for view in images])
    features = tuned(tokens)["features"]
    for view in (0, 1):
        torch.testing.assert_close(features[view], vit(images[view]).detach())
    assert not features.requires_grad


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_aug"])
def test_learning_rates_decay_towards_the_input(size: str, suffix: str) -> None:
    """Block i of L has 0.65^(L - i), counted over the whole depth; biases and norms decay not."""
    recipe: MaeCtRecipe = load_recipe(f"mae_ct_vit_{size}_imagenet{suffix}", MaeCtRecipe)
    run = recipe.tune_run()
    depth, num_frozen = run.model.depth, run.num_frozen_blocks
    with torch.device("meta"):
        vit = VisionTransformer(embed_dim=8, num_heads=1, depth=depth, num_classes=0)
        module = TunedEncoder(UpperEncoder(vit, num_frozen), NnclrHead(8, 4, 4, 4))
    names = {id(p): name.removeprefix("encoder.") for name, p in module.named_parameters()}
    found = {}
    for group in tuned_param_groups(module, depth, run.tune):
        for parameter in group["params"]:
            name, is_vector = names.pop(id(parameter)), parameter.ndim == 1
            found[name] = group["lr_scale"]
            decay = 1e-5 if name.startswith("head.") else 0.05
            assert group["weight_decay"] == (0 if is_vector else decay)
    assert not names  # each weight is in one group
    for name, scale in found.items():
        if name.startswith("blocks."):
            assert scale == pytest.approx(0.65 ** (depth - int(name.split(".")[1])))
    assert found["norm.weight"] == 1
    assert found[f"blocks.{num_frozen}.norm1.bias"] == pytest.approx(PUBLISHED[size], rel=0.02)
    assert f"blocks.{num_frozen - 1}.norm1.bias" not in found
    head_rate = 5 if suffix else 1
    assert all(found[n] == pytest.approx(head_rate) for n in found if n.startswith("head."))
    assert run.tune.lr == pytest.approx(8e-4 if run.tune.batch_size == 1024 else 4e-4)


# --- the averaged projector ----------------------------------------------------------------------


def test_an_average_is_a_copy_that_follows() -> None:
    torch.manual_seed(0)
    head = NnclrHead(6, 8, 4, 8)
    target = TargetProjector(head.projector, 0.9, torch.device("cpu"), torch.float32)
    expected = {name: t.clone().double() for name, t in head.projector.state_dict().items()}
    features = torch.randn(5, 6)
    for _ in range(3):
        with torch.no_grad():
            for parameter in head.projector.parameters():
                parameter += torch.randn_like(parameter)
            head(features[None])  # moves the running statistics
        for name, tensor in target.state_dict().items():
            torch.testing.assert_close(tensor.double(), expected[name])  # not yet
        target.update(head.projector.state_dict())
        averaged = {name for name, _ in head.projector.named_parameters()}
        for name, tensor in head.projector.state_dict().items():
            kept = 0.9 * expected[name] + 0.1 * tensor.double()
            expected[name] = kept if name in averaged else tensor.double()
    state = target.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-6, atol=1e-6)
    plain = nn.Sequential(*head.projector)
    plain.load_state_dict(state)
    torch.testing.assert_close(target(features), plain(features))
    assert not target(features).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_of_a_file_is_not_overwritten(tune_run: TuneRun, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, other = NnclrHead(6, 8, 4, 8), NnclrHead(6, 8, 4, 8)
    state = {f"target_projector.{n}": t for n, t in other.projector.state_dict().items()}
    for given, source in ((state, other), ({}, head)):
        target = build_target(tune_run, head, given, torch.device("cpu"), dtype)
        assert target.decay == tune_run.tune.target_ema_decay
        for name, tensor in target.state_dict().items():
            assert tensor.dtype != torch.bfloat16
            assert torch.equal(tensor, source.projector.state_dict()[name])
            assert tensor.data_ptr() != source.projector.state_dict()[name].data_ptr()
