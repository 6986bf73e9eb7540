"""UperNet: counts and shapes by hand, every head against its formula, batch norm over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.models.attention import Attention
from mlomae.models.batch_norm import BatchNorm
from mlomae.models.upernet import StandardHead, TutorialHead, UperNet, feature_blocks
from tests.ranks import run_ranks

WIDTH, NUM_CLASSES = 24, 5


def tiny_vit(depth: int = 4, image_size: Any = 32, **options: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=image_size, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=2,
        num_classes=0, attn_layer=Attention, **options,
    )  # fmt: skip


def tiny(preset: Any = "standard", **options: Any) -> UperNet:
    channels = 16 if preset == "standard" else None
    torch.manual_seed(0)
    return UperNet(tiny_vit(), NUM_CLASSES, preset=preset, channels=channels, **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- sizes -------------------------------------------------------------------------------------


def standard_counts(d: int, c: int, k: int) -> dict[str, int]:
    """Parameters of D-wide features and a C-wide head, from the table: BN has 2 per channel."""
    quadruple = 2 * (4 * d * d + d) + 2 * d
    pooling = 4 * (d * c + 2 * c) + 9 * (d + 4 * c) * c + 2 * c
    laterals, smoothing = 3 * (d * c + 2 * c), 3 * (9 * c * c + 2 * c)
    return {
        "neck": quadruple + (4 * d * d + d),
        "head": pooling + laterals + smoothing + 9 * 4 * c * c + 2 * c + (c * k + k),
        "auxiliary_head": 9 * d * 256 + 2 * 256 + (256 * k + k),
    }


def tutorial_counts(d: int, k: int) -> dict[str, int]:
    """The tutorial's head is as wide as its input; its laterals and smoothing have a bias."""
    quadruple = 2 * (4 * d * d + d) + 2 * d
    rest = (4 * d * d + d) + 2 * (9 * d * d + d) + 3 * 2 * d
    pooling = 4 * (d * (d // 4) + 2 * (d // 4)) + 9 * (2 * d) * d + 2 * d
    laterals, smoothing = 3 * (d * d + d), 3 * (9 * d * d + d)
    head = pooling + laterals + smoothing + 9 * 4 * d * d + 2 * d + (9 * d * k + k)
    return {"neck": quadruple + rest, "head": head}


@pytest.mark.parametrize(
    ("preset", "width", "depth", "channels", "auxiliary"),
    [
        ("standard", 768, 12, 768, True),
        ("standard", 1024, 24, None, True),
        ("standard", 768, 12, 512, False),
        ("tutorial", 768, 12, None, False),
    ],
)
def test_counts_and_output_at_512(preset, width, depth, channels, auxiliary):
    with torch.device("meta"):
        vit = VisionTransformer(512, 16, embed_dim=width, depth=depth, num_heads=16)
        network = UperNet(vit, 150, preset=preset, channels=channels, auxiliary=auxiliary)
        out = network(torch.empty(2, 3, 512, 512))
    assert out["logits"].shape == (2, 150, 512, 512)
    assert (out["auxiliary"] is not None) == auxiliary
    assert not auxiliary or out["auxiliary"].shape == (2, 150, 512, 512)
    expected = (
        tutorial_counts(width, 150)
        if preset == "tutorial"
        else standard_counts(width, channels or 512, 150)
    )
    names = [name for name in expected if name != "auxiliary_head" or auxiliary]
    assert {name: count(getattr(network, name)) for name in names} == {
        name: expected[name] for name in names
    }
    encoder = 12 * width**2 + 13 * width  # of a block
    stem = (32 * 32 + 1) * width + width + 3 * 16 * 16 * width + width
    assert count(network.backbone) == depth * encoder + stem  # no final norm, no head


def test_the_published_sizes_in_full():
    """The closed forms above at the sizes of ADE20K, as plain numbers."""
    assert standard_counts(768, 768, 150) == {
        "neck": 7_081_728, "head": 67_963_542, "auxiliary_head": 1_808_534,
    }  # fmt: skip
    assert tutorial_counts(768, 150) == {"neck": 17_704_704, "head": 51_181_206}


@pytest.mark.parametrize("preset", ["standard", "tutorial"])
def test_scales_fall_from_the_shallowest_feature(preset):
    network = tiny(preset).eval()
    sides: list[tuple[int, ...]] = []
    network.head.register_forward_pre_hook(
        lambda _, args: sides.extend(tuple(x.shape[1:]) for x in args[0])
    )
    network(torch.randn(1, 3, 32, 32))
    assert sides == [(WIDTH, side, side) for side in (16, 8, 4, 2)]


def test_feature_blocks():
    assert feature_blocks(12) == (3, 5, 7, 11) and feature_blocks(24) == (7, 11, 15, 23)
    assert feature_blocks(32) == (7, 15, 23, 31) and feature_blocks(4) == (0, 1, 2, 3)
    assert feature_blocks(6) == (0, 2, 3, 5)
    with pytest.raises(ValueError, match="four blocks"):
        feature_blocks(3)


# --- features ----------------------------------------------------------------------------------


def test_features_are_the_blocks_tokens_laid_out_row_by_row():
    """Oblong, so that rows and columns cannot be exchanged; the class token is left out."""
    torch.manual_seed(0)
    vit = tiny_vit(depth=12, image_size=(16, 40), class_token=True)
    blocks = list(vit.blocks)
    outputs: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, out, n=number: outputs.__setitem__(n, out))
    network = UperNet(vit, NUM_CLASSES, channels=8)
    features = network.backbone(torch.randn(2, 3, 16, 40))
    assert [f.shape for f in features] == [(2, WIDTH, 2, 5)] * 4
    for feature, number in zip(features, (3, 5, 7, 11), strict=True):
        for row in range(2):
            for column in range(5):
                token = outputs[number][:, 1 + 5 * row + column]
                assert torch.equal(feature[:, :, row, column], token)


def test_positions_follow_other_sizes():
    network = UperNet(tiny_vit(dynamic_img_size=True), NUM_CLASSES, channels=8).eval()
    assert network(torch.randn(1, 3, 48, 64))["logits"].shape == (1, NUM_CLASSES, 48, 64)


# --- heads -------------------------------------------------------------------------------------


def randomise(module: nn.Module) -> nn.Module:
    """Weights and statistics that no two channels share; in float64 and eval mode."""
    torch.manual_seed(1)
    module.double().eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = (
                torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor)
            )
    return module


def bilinear(x: Tensor, size: tuple[int, int], align: bool) -> Tensor:
    """The interpolation by its definition, one axis after the other."""
    for axis, length in ((2, size[0]), (3, size[1])):
        old = x.shape[axis]
        target = torch.arange(length, dtype=torch.float64)
        if align:
            place = target * (old - 1) / max(length - 1, 1)
        else:
            place = ((target + 0.5) * old / length - 0.5).clamp(0, old - 1)
        low = place.long().clamp(max=old - 1)
        high = (low + 1).clamp(max=old - 1)
        share = (place - low).view([-1 if a == axis else 1 for a in range(4)])
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


class Formula:
    """Convolutions, norms and means of a module's state, called by name."""

    def __init__(self, module: nn.Module) -> None:
        self.state = module.state_dict()

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Sum over the kernel's shifts of the padded map."""
        kernel, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        side = kernel.shape[-1]
        padded = F.pad(x, [side // 2] * 4)
        out = sum(
            torch.einsum(
                "oi,bihw->bohw",
                kernel[:, :, dy, dx],
                padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]],
            )
            for dy in range(side)
            for dx in range(side)
        )
        return out if bias is None else out + bias[:, None, None]

    def conv_norm_relu(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.0", x)
        mean, variance, weight, bias = (
            self.state[f"{name}.1.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return ((y - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)

    def pooled(self, x: Tensor, cells: tuple[int, ...], align: bool) -> Tensor:
        maps = [x]
        for number, n in enumerate(cells):
            rows = [[cell.mean((2, 3)) for cell in _cut(row, n, 3)] for row in _cut(x, n, 2)]
            means = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
            name = f"pooling.cells.{number}.1"
            maps.append(bilinear(self.conv_norm_relu(name, means), x.shape[2:], align))
        return self.conv_norm_relu("pooling.merge", torch.cat(maps, dim=1))


def _cut(x: Tensor, n: int, axis: int) -> list[Tensor]:
    """n cells of an axis, from floor(i L / n) to ceil((i + 1) L / n)."""
    length = x.shape[axis]
    bounds = [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
    return [x.narrow(axis, start, stop - start) for start, stop in bounds]


def pyramid(width: int) -> list[Tensor]:
    torch.manual_seed(2)
    sizes = [(28, 20), (14, 10), (7, 5), (3, 2)]
    return [torch.randn(2, width, *size, dtype=torch.float64) for size in sizes]


def test_standard_head_follows_the_formula():
    """Each finer map adds the running sum of all coarser ones."""
    head = randomise(StandardHead(6, 4, NUM_CLASSES))
    formula, maps = Formula(head), pyramid(6)
    running = deepest = formula.pooled(maps[3], (1, 2, 3, 6), align=False)
    levels = [deepest]
    for i in (2, 1, 0):
        lateral = formula.conv_norm_relu(f"laterals.{i}", maps[i])
        running = lateral + bilinear(running, lateral.shape[2:], False)
        levels.insert(0, formula.conv_norm_relu(f"smoothing.{i}", running))
    fused = torch.cat([bilinear(x, (28, 20), False) for x in levels], dim=1)
    expected = formula.conv("classifier", formula.conv_norm_relu("fusion", fused))
    torch.testing.assert_close(head(maps), expected, rtol=1e-9, atol=1e-9)


def test_tutorial_head_follows_the_formula():
    """Each finer map adds its coarser neighbour's lateral alone; corners are aligned."""
    head = randomise(TutorialHead(8, NUM_CLASSES))
    formula, maps = Formula(head), pyramid(8)
    coarser = [*maps[1:3], formula.pooled(maps[3], (1, 2, 4, 6), align=True)]
    laterals = [maps[0], *(formula.conv(f"laterals.{i}", x) for i, x in enumerate(coarser))]
    levels = []
    for i in range(3):
        above = bilinear(laterals[i + 1], laterals[i].shape[2:], True)
        levels.append(formula.conv(f"smoothing.{i}", laterals[i] + above))
    fused = torch.cat([bilinear(x, (28, 20), True) for x in (*levels, laterals[3])], dim=1)
    expected = formula.conv("classifier", formula.conv_norm_relu("fusion", fused))
    torch.testing.assert_close(head(maps), expected, rtol=1e-9, atol=1e-9)


def test_the_tutorials_head_has_the_backbones_width():
    with pytest.raises(ValueError, match="24 wide"):
        UperNet(tiny_vit(), NUM_CLASSES, preset="tutorial", channels=16)


def test_auxiliary_logits_are_for_training_alone():
    network, images = tiny(), torch.randn(2, 3, 32, 32)
    feature = network.backbone(images)[2]
    network.auxiliary_head.eval()  # leave dropout and the batch's own statistics out
    expected = bilinear(network.auxiliary_head(feature).double(), (32, 32), False)
    torch.testing.assert_close(network(images)["auxiliary"].double(), expected)
    assert network.eval()(images)["auxiliary"] is None


@pytest.mark.parametrize("preset", ["standard", "tutorial"])
def test_bfloat16_weights_give_float32_logits(preset):
    network = tiny(preset)
    for parameter in network.parameters():  # buffers stay float32, as DeepSpeed keeps them
        parameter.data = parameter.data.bfloat16()
    out = network(torch.randn(2, 3, 32, 32))
    assert out["logits"].dtype == out["auxiliary"].dtype == torch.float32
    (out["logits"].mean() + out["auxiliary"].mean()).backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


# --- batch norm --------------------------------------------------------------------------------


def _norm_on_a_part(x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """This rank's half through the norm: its output, and gradients of the mean of all losses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    norm = BatchNorm(x.shape[1]).double()
    norm.weight.data.uniform_(), norm.bias.data.uniform_()
    images = x.chunk(world_size)[rank].clone().requires_grad_()
    out = norm(images)
    ((out - target.chunk(world_size)[rank]) ** 2).mean().backward()
    for parameter in norm.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size
    values = {
        "out": out.detach(),
        "x.grad": images.grad / world_size,
        "weight": norm.weight.detach(),
    }
    grads = {f"{name}.grad": p.grad for name, p in norm.named_parameters()}
    norm.eval()
    return values | grads | dict(norm.named_buffers()) | {"eval": norm(images).detach()}


def test_batch_norm_over_ranks_is_torchs_over_the_whole_batch(tmp_path: Path):
    torch.manual_seed(4)
    x, target = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    ranks = run_ranks("tests.models.test_upernet:_norm_on_a_part", 2, tmp_path, x=x, target=target)
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(3).double()
    norm.weight.data.uniform_(), norm.bias.data.uniform_()
    x.requires_grad_()
    out = norm(x)
    ((out - target) ** 2).mean().backward()
    whole = {"out": out.detach(), "x.grad": x.grad, "eval": norm.eval()(x).detach()}
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected)
    alike = {f"{name}.grad": p.grad for name, p in norm.named_parameters()} | dict(
        norm.named_buffers()
    )
    for rank in ranks:
        for name, expected in alike.items():
            torch.testing.assert_close(rank[name], expected)
