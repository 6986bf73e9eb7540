"""The masking network and the heads, against their formulas."""

import pytest
import torch
from torch import Tensor

from mlomae.models import (
    ClassificationHead,
    MaskedAutoencoder,
    MaskingNetwork,
    SegmentationHead,
    reconstruction_loss,
)

BATCH, NUM_PATCHES, NUM_HIDDEN, DIM = 3, 9, 5, 8


@pytest.fixture
def masked() -> tuple[MaskedAutoencoder, MaskingNetwork, Tensor]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=6, patch_size=2, embed_dim=DIM, depth=1, num_heads=2, mask_ratio=0.5,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
    ).double()  # fmt: skip
    network = MaskingNetwork(NUM_PATCHES, DIM, hidden_dim=6).double()
    return model, network, torch.randn(BATCH, 3, 6, 6, dtype=torch.float64)


def test_scores_follow_the_formula(masked):
    _, network, _ = masked
    embedding = torch.randn(2, NUM_PATCHES, DIM, dtype=torch.float64)
    scores = network(embedding)
    assert scores.shape == (2, NUM_PATCHES) and scores.dtype == torch.float64
    for e, score in zip(embedding, scores, strict=True):
        row = torch.cat(list(e))  # patch after patch
        hidden = (network.fc1.weight @ row + network.fc1.bias).clamp(min=0)
        logits = network.fc2.weight @ hidden + network.fc2.bias
        torch.testing.assert_close(score, 1 / (1 + (-logits).exp()), rtol=1e-12, atol=0)


def test_theta_enters_through_the_loss_weights_alone(masked):
    """The gradient is 1 / (B n_mask) times the sum of l_ij ds_ij / dtheta over hidden patches."""
    model, network, images = masked
    out = model(images, scorer=network)
    assert out["mask"].sum() == BATCH * NUM_HIDDEN
    plain = reconstruction_loss(out["patch_loss"], out["mask"])
    assert torch.autograd.grad(plain, network.fc1.weight, allow_unused=True) == (None,)

    reconstruction_loss(out["patch_loss"] * out["scores"], out["mask"]).backward()
    with torch.no_grad():
        e, s = out["embedding"].flatten(1), out["scores"]
        hidden = (e @ network.fc1.weight.T + network.fc1.bias).clamp(min=0)
        by_score = out["patch_loss"] * out["mask"] / (BATCH * NUM_HIDDEN)
        by_logit = by_score * s * (1 - s)
        by_hidden = by_logit @ network.fc2.weight * (hidden > 0)
    expected = {
        "fc1.weight": by_hidden.T @ e,
        "fc1.bias": by_hidden.sum(dim=0),
        "fc2.weight": by_logit.T @ hidden,
        "fc2.bias": by_logit.sum(dim=0),
    }
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-14)


def test_the_encoder_feels_frozen_scores(masked):
    """Its gradient with a live network is that with the same numbers as constants."""
    model, network, images = masked
    gradients = []
    constant = model(images, scorer=network)["scores"].detach()
    for scorer in (network, lambda _: constant):
        model.zero_grad()
        out = model(images, scorer=scorer)
        reconstruction_loss(out["patch_loss"] * out["scores"], out["mask"]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_logits_follow_the_formula():
    torch.manual_seed(0)
    head = ClassificationHead(DIM, 5).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    features = torch.randn(4, DIM, dtype=torch.float64)
    logits = head(features)
    assert logits.shape == (4, 5) and logits.dtype == torch.float64
    centred = features - features.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    normed = normed * head.norm.weight + head.norm.bias
    torch.testing.assert_close(logits, normed @ head.head.weight.T + head.head.bias)


def test_logits_of_a_bfloat16_head_are_float32():
    head = ClassificationHead(DIM, 5).bfloat16()
    assert head(torch.randn(4, DIM, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(("arguments", "rate"), [({}, 0.1), ({"dropout": 0.5}, 0.5)])
def test_dropout_hides_normed_features_while_training(arguments, rate):
    torch.manual_seed(0)
    head = ClassificationHead(100, 100, **arguments)
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(100))
        head.head.bias.zero_()
    features = torch.randn(200, 100)
    kept_whole, dropped = head.eval()(features), head.train()(features)
    is_zero = dropped == 0
    assert float(is_zero.float().mean()) == pytest.approx(rate, abs=0.02)
    torch.testing.assert_close(dropped[~is_zero], kept_whole[~is_zero] / (1 - rate))


def test_bf16_scores_do_not_tie_where_the_mask_is_cut():
    torch.manual_seed(0)
    network = MaskingNetwork(196, 64, 32).bfloat16()
    scores = network(torch.randn(16, 196, 64).bfloat16()).sort(dim=1).values
    assert scores.dtype == torch.float32
    num_distinct = [len(row.unique()) for row in scores]
    assert min(num_distinct) == 196  # rounded to bf16 there are about 180


def test_features_lie_on_the_map_where_their_patch_lies_in_the_image():
    """Blocks that add nothing leave each token with what its own patch gave it."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=(4, 6), patch_size=2, embed_dim=DIM, depth=1, num_heads=2,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2,
    ).double()  # fmt: skip
    (block,) = model.blocks
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
    images = torch.randn(BATCH, 3, 4, 6, dtype=torch.float64)
    features = model(images, as_map=True)
    assert features.shape == (BATCH, DIM, 2, 3)
    kernel, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            position = model.pos_embed[0, 1 + 3 * row + column]
            token = model.norm(patch.flatten(1) @ kernel.T + bias + position)
            torch.testing.assert_close(features[:, :, row, column], token)


def test_a_segmentation_head_treats_each_place_as_a_classification_head_does():
    torch.manual_seed(0)
    head = SegmentationHead(DIM, 5).eval()
    alone = ClassificationHead(DIM, 5).eval()
    alone.load_state_dict(head.state_dict())
    features = torch.randn(BATCH, DIM, 2, 3)
    logits = head(features)
    assert logits.shape == (BATCH, 5, 2, 3)
    for row in range(2):
        for column in range(3):
            expected = alone(features[:, :, row, column])
            torch.testing.assert_close(logits[:, :, row, column], expected)
    assert head.bfloat16()(features.bfloat16()).dtype == torch.float32
