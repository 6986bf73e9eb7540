"""Sizes, names, positions and initial values of the networks, against the published ones."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mlomae.errors import UserError
from mlomae.models import (
    ClassificationHead,
    LightMaskingNetwork,
    MaskedAutoencoder,
    MaskingNetwork,
)
from mlomae.models.positions import sincos_positions

VIT = {
    "B/16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "L/16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "H/16": {"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "H/14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
    "B/2": {"image_size": 32, "patch_size": 2, "embed_dim": 768, "depth": 12, "num_heads": 12},
}
DECODER = ("decoder_", "mask_token")


def on_meta(name: str) -> MaskedAutoencoder:
    with torch.device("meta"):
        return MaskedAutoencoder(**VIT[name])


def millions(model: nn.Module, *, decoder: bool, positions: bool) -> float:
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    return 1e-6 * sum(
        size
        for name, size in sizes.items()
        if name.startswith(DECODER) == decoder and (positions or not name.endswith("pos_embed"))
    )


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "total"),
    [
        ("B/16", 85.80, 26.11, 111.91),
        ("L/16", 303.30, 26.24, 329.54),
        ("H/14", 630.76, 26.31, 657.07),
        ("B/2", 85.26, 25.75, 111.02),
    ],
)
def test_sizes_with_positions_and_tokens(name, encoder, decoder, total):
    model = on_meta(name)
    counts = [millions(model, decoder=d, positions=True) for d in (False, True)]
    assert [f"{count:.2f}" for count in (*counts, sum(counts))] == [
        f"{count:.2f}" for count in (encoder, decoder, total)
    ]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("B/16", "85.65", "26.0"),
        ("L/16", "303.10", "26.1"),
        ("H/16", "630.67", "26.3"),
        ("H/14", "630.44", "26.2"),
    ],
)
def test_sizes_without_positions(name, encoder, decoder):
    model = on_meta(name)
    assert f"{millions(model, decoder=False, positions=False):.2f}" == encoder
    assert f"{millions(model, decoder=True, positions=False):.1f}" == decoder


@pytest.mark.parametrize(
    ("num_patches", "embed_dim", "size"),
    [(196, 768, "77.17"), (196, 1024, "102.86"), (256, 1280, "167.90"), (256, 768, "100.80")],
)
def test_size_of_the_masking_network(num_patches, embed_dim, size):
    with torch.device("meta"):
        network = MaskingNetwork(num_patches, embed_dim)
    assert f"{1e-6 * sum(p.numel() for p in network.parameters()):.2f}" == size


# --- names -----------------------------------------------------------------------------------


def published_layout(
    width: int, depth: int, patch: int, num_patches: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `mae_pretrain_vit_*_full.pth`."""
    vector = 3 * patch**2
    layout: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, num_patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (512, width),
        "decoder_embed.bias": (512,),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed": (1, num_patches + 1, 512),
        "decoder_norm.weight": (512,),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (vector, 512),
        "decoder_pred.bias": (vector,),
    }
    for blocks, count, dim in (("blocks", depth, width), ("decoder_blocks", 8, 512)):
        for i in range(count):
            layout |= {
                f"{blocks}.{i}.norm1.weight": (dim,),
                f"{blocks}.{i}.norm1.bias": (dim,),
                f"{blocks}.{i}.attn.qkv.weight": (3 * dim, dim),
                f"{blocks}.{i}.attn.qkv.bias": (3 * dim,),
                f"{blocks}.{i}.attn.proj.weight": (dim, dim),
                f"{blocks}.{i}.attn.proj.bias": (dim,),
                f"{blocks}.{i}.norm2.weight": (dim,),
                f"{blocks}.{i}.norm2.bias": (dim,),
                f"{blocks}.{i}.mlp.fc1.weight": (4 * dim, dim),
                f"{blocks}.{i}.mlp.fc1.bias": (4 * dim,),
                f"{blocks}.{i}.mlp.fc2.weight": (dim, 4 * dim),
                f"{blocks}.{i}.mlp.fc2.bias": (dim,),
            }
    return layout


@pytest.mark.parametrize(
    ("name", "num_patches"), [("B/16", 196), ("L/16", 196), ("H/14", 256), ("B/2", 256)]
)
def test_names_and_shapes_are_those_of_the_published_files(name, num_patches):
    size = VIT[name]
    expected = published_layout(size["embed_dim"], size["depth"], size["patch_size"], num_patches)
    assert {k: tuple(v.shape) for k, v in on_meta(name).state_dict().items()} == expected


def test_positions_are_parameters_only_where_they_are_trained():
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    fixed, trained = (MaskedAutoencoder(**sizes, trainable_positions=t) for t in (False, True))
    names = {"pos_embed", "decoder_pos_embed"}
    assert {name for name, _ in fixed.named_buffers()} == names
    assert not names & {name for name, _ in fixed.named_parameters()}
    assert not list(trained.named_buffers())
    assert {name for name, p in trained.named_parameters() if p.requires_grad} >= names
    trained.load_state_dict(fixed.state_dict())  # the names are the same


# --- positions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "grid"), [(8, (3, 3)), (512, (14, 14)), (1280, (16, 16)), (16, (2, 5))]
)
def test_positions_follow_the_formula(dim, grid):
    frequencies = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
    rows = [[0.0] * dim]
    for row in range(grid[0]):
        for column in range(grid[1]):
            rows.append(
                [math.sin(column * f) for f in frequencies]
                + [math.cos(column * f) for f in frequencies]
                + [math.sin(row * f) for f in frequencies]
                + [math.cos(row * f) for f in frequencies]
            )
    table = sincos_positions(dim, grid)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), np.array([rows]), atol=1e-7)


def test_positions_need_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4 for 2-D positions, got 18"):
        sincos_positions(18, (4, 4))


def test_both_tables_of_a_model_are_sincos():
    model = MaskedAutoencoder(
        image_size=12, patch_size=4, embed_dim=16, depth=1, num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    assert torch.equal(model.pos_embed, sincos_positions(16, (3, 3)))
    assert torch.equal(model.decoder_pos_embed, sincos_positions(8, (3, 3)))


# --- cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "features", "pretraining"),
    [  # 10^9 multiplications of one image; B/2 by the formula of a block, 12 N D^2 + 2 N^2 D
        ("B/16", 17.6, 9.8),
        ("L/16", 61.6, 20.8),
        ("H/14", 167.3, 48.6),
        ("B/2", 23.05, 12.6),
    ],
)
def test_cost_of_features_and_of_pretraining(name, features, pretraining):
    with torch.device("meta"):
        model = MaskedAutoencoder(**VIT[name], attention="math").eval()
        images = torch.zeros(1, 3, *model.image_size)
        for scorer, wanted in ((None, features), (lambda e: e[..., 0], pretraining)):
            with FlopCounterMode(display=False) as counter:
                model(images, scorer=scorer)
            assert counter.get_total_flops() / 2e9 == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize(
    ("name", "like"),
    [("mae_vit_base_patch16", "B/16"), ("mae_vit_large_patch16", "L/16"),
     ("mae_vit_huge_patch16", "H/16"), ("mae_vit_huge_patch14", "H/14"),
     ("mae_vit_base_patch2", "B/2")],
)  # fmt: skip
def test_timm_knows_the_models_by_name(name, like):
    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = on_meta(like)
    assert (model.image_size, model.num_heads) == (wanted.image_size, wanted.num_heads)
    shapes = [{n: v.shape for n, v in m.state_dict().items()} for m in (model, wanted)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "like"), [("tiny", "deit_tiny"), ("small", "deit_small")])
def test_small_models_have_the_sizes_of_deit(name, like):
    with torch.device("meta"):
        model = timm.create_model(f"mae_vit_{name}_patch16", decoder_depth=1)
        deit = timm.create_model(f"{like}_patch16_224", num_classes=0)
    ours = {n: v.shape for n, v in model.state_dict().items() if not n.startswith(DECODER)}
    assert ours == {n: v.shape for n, v in deit.state_dict().items()}
    assert model.num_heads == deit.blocks[0].attn.num_heads


def test_timm_hands_arguments_on_and_has_no_weights_to_offer():
    model = timm.create_model(
        "mae_vit_tiny_patch16", image_size=(32, 64), depth=1, decoder_depth=1, in_chans=1
    )
    assert model(torch.zeros(2, 1, 32, 64)).shape == (2, 192)
    with pytest.raises(ValueError, match=r"load a file with mlomae\.foreign\.load_weights"):
        timm.create_model("mae_vit_tiny_patch16", pretrained=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"image_size": 230}, "image_size is 230"), ({"global_pool": "cls"}, "choose token or avg")],
)
def test_arguments_that_would_do_something_else_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence), torch.device("meta"):
        MaskedAutoencoder(**changes)


# --- initial values --------------------------------------------------------------------------


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so what nobody initialises shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("trainable_positions", [False, True])
def test_everything_is_initialised(trainable_positions):
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    networks = {
        "mae": MaskedAutoencoder(**sizes, trainable_positions=trainable_positions),
        "masking": MaskingNetwork(4, 8, hidden_dim=5),
        "light masking": LightMaskingNetwork(8, hidden_dim=8),
        "classifier": ClassificationHead(8, 3),
    }
    for kind, network in networks.items():
        for name, value in network.state_dict().items():
            assert value.isfinite().all(), (kind, name)


def test_initial_values_are_those_of_mae():
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=16, patch_size=4, embed_dim=256, depth=1, num_heads=4,
        decoder_embed_dim=512, decoder_depth=1, decoder_num_heads=4,
    )  # fmt: skip
    patch = 3 * 4 * 4
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert module.eps == 1e-6
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
            check_xavier(name, module.weight)  # the fused QKV counts as one matrix
    check_xavier("patch_embed", model.patch_embed.proj.weight.reshape(256, patch))

    bias = model.patch_embed.proj.bias
    assert bias.abs().max() <= patch**-0.5 and bias.std() > 0.4 * patch**-0.5
    for token in (model.cls_token, model.mask_token):
        assert abs(token.mean()) < 0.004 and 0.017 < token.std() < 0.023


def check_xavier(name: str, matrix: torch.Tensor) -> None:
    matrix = matrix.detach()
    bound = math.sqrt(6 / sum(matrix.shape))
    assert 0.98 * bound < matrix.abs().max() <= bound, name
    assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03), name
