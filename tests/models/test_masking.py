"""Masking networks and baselines, against formulas, brute force and exact probabilities."""

import math
import random
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlomae.models import MaskedAutoencoder, MaskingNetwork
from mlomae.models.mae import choose_masks
from mlomae.models.masking import LightMaskingNetwork, block_scores, gumbel_keys, random_scores
from mlomae.models.positions import sincos_positions
from tests.models.plain_mae import PlainMae

WIDTHS = [192, 384, 768, 1024, 1280]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(batch: int, num_patches: int, dim: int, seed: int = 1) -> Tensor:
    shape = (batch, num_patches, dim)
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


# --- the light network -----------------------------------------------------------------------


def light(dim: int = 24, hidden_dim: int = 16) -> LightMaskingNetwork:
    """A float64 network whose every value is random: no gain of 1, no bias of 0."""
    torch.manual_seed(0)
    network = LightMaskingNetwork(dim, hidden_dim).double()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return network


def test_light_scores_are_those_of_plain_numpy():
    network, embedding = light(), embeddings(2, 9, 24)
    weights = {
        name.replace("block.", "blocks.0."): value.double().numpy()
        for name, value in network.state_dict().items()
    }
    plain = PlainMae(weights, patch_size=1, num_heads=4, decoder_num_heads=1)
    scores = network(embedding)
    assert scores.shape == (2, 9)
    for patches, image_scores in zip(embedding.numpy(), scores.detach().numpy(), strict=True):
        tokens = plain._linear("embed", plain._norm("norm_in", patches))
        tokens = plain._norm("norm", plain._blocks("blocks", tokens, 4))
        logits = plain._linear("score", tokens)[:, 0]
        np.testing.assert_allclose(image_scores, 1 / (1 + np.exp(-logits)), rtol=1e-11)


@pytest.mark.parametrize("dim", WIDTHS)
def test_the_light_network_has_less_than_a_million_parameters(dim):
    with torch.device("meta"):
        network = LightMaskingNetwork(dim)
    hidden = 128
    weights = dim * hidden + 12 * hidden**2 + hidden  # embed; qkv, proj, fc1, fc2; score
    vectors = 2 * dim + hidden + (3 + 1 + 4 + 1 + 3 * 2) * hidden + 1  # norms and biases
    assert sum(p.numel() for p in network.parameters()) == weights + vectors < 1_000_000


def test_one_light_network_serves_every_number_of_patches():
    network = light()
    for num_patches in (1, 9, 50):
        assert network(embeddings(2, num_patches, 24)).shape == (2, num_patches)


def test_light_scores_follow_their_patches_wherever_they_are():
    network, embedding = light(), embeddings(2, 9, 24)
    order = torch.randperm(9, generator=seeded())
    torch.testing.assert_close(
        network(embedding[:, order]), network(embedding)[:, order], rtol=1e-12, atol=0
    )


def test_a_light_score_knows_the_whole_image():
    network, embedding = light(), embeddings(1, 9, 24)
    before = network(embedding)
    embedding[:, 4] += embeddings(1, 1, 24, seed=2)[:, 0]
    assert ((network(embedding) - before).abs() > 1e-6).all()


def test_every_parameter_of_the_light_network_is_set_by_its_initialisation():
    network = LightMaskingNetwork(24, 16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(math.nan)
    network.init_weights()
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("dim", [192, 1280])
def test_untrained_light_scores_are_spread_around_one_half(dim):
    torch.manual_seed(0)
    content = torch.randn(4, 196, dim)
    scores = LightMaskingNetwork(dim)(content + sincos_positions(dim, (14, 14))[:, 1:])
    assert (scores - 0.5).abs().max() < 0.4
    assert (scores.std(dim=1) > 0.01).all()
    assert min(len(row.unique()) for row in scores) > 190


@pytest.mark.parametrize("network", [MaskingNetwork(16, 24, 8), LightMaskingNetwork(24, 16)])
def test_scores_of_a_bfloat16_network_are_float32(network):
    embedding = embeddings(2, 16, 24).float()
    exact = network(embedding)
    half = network.bfloat16()(embedding.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


# --- block-wise masks ------------------------------------------------------------------------


def hidden_blocks(grid: tuple[int, int], num_hidden: int, batch: int, seed: int = 0) -> Tensor:
    """Masks of `block_scores`, bool [B, rows, columns]."""
    values = block_scores(grid, num_hidden, seeded(seed))(torch.zeros(batch, math.prod(grid), 1))
    masks = torch.zeros_like(values, dtype=torch.bool)
    return masks.scatter(1, values.topk(num_hidden).indices, True).view(-1, *grid)


def algorithm_1(grid: tuple[int, int], num_hidden: int, draw: random.Random) -> np.ndarray:
    """BEiT's algorithm, one rectangle and one patch at a time, trimmed to the exact count."""
    rows, columns = grid
    smallest = min(16, 16 * rows * columns / 196)
    hidden: set[tuple[int, int]] = set()
    while len(hidden) < num_hidden:
        area = draw.uniform(smallest, max(smallest, num_hidden - len(hidden)))
        ratio = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        height = max(1, min(rows, round(math.sqrt(area * ratio))))
        width = max(1, min(columns, round(math.sqrt(area / ratio))))
        top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
        box = {(i, j) for i in range(top, top + height) for j in range(left, left + width)}
        new = sorted(box - hidden)
        hidden |= set(draw.sample(new, min(len(new), num_hidden - len(hidden))))
    mask = np.zeros(grid, dtype=bool)
    mask[tuple(np.array(sorted(hidden)).T)] = True
    return mask


def borders(masks: np.ndarray) -> np.ndarray:
    """Neighbouring patches of which one is hidden and the other is not, by image."""
    return (np.diff(masks, axis=1) != 0).sum(axis=(1, 2)) + (np.diff(masks, axis=2) != 0).sum(
        axis=(1, 2)
    )


@pytest.mark.parametrize(
    ("grid", "num_hidden"),
    [((14, 14), 147), ((14, 14), 195), ((16, 16), 102), ((4, 4), 12), ((3, 9), 20), ((1, 5), 4)],
)
def test_block_masks_hide_the_exact_count(grid, num_hidden):
    masks = hidden_blocks(grid, num_hidden, batch=50)
    assert masks.flatten(1).sum(dim=1).tolist() == [num_hidden] * 50
    assert torch.equal(masks, hidden_blocks(grid, num_hidden, batch=50))
    assert not torch.equal(masks, hidden_blocks(grid, num_hidden, batch=50, seed=1))


@pytest.mark.parametrize(("grid", "num_hidden"), [((14, 14), 78), ((8, 12), 72), ((14, 14), 5)])
def test_block_masks_are_distributed_as_those_of_the_published_algorithm(grid, num_hidden):
    ours = hidden_blocks(grid, num_hidden, batch=1500).numpy()
    draw = random.Random(0)
    theirs = np.stack([algorithm_1(grid, num_hidden, draw) for _ in range(1500)])
    noise = math.sqrt(2 * 0.25 / 1500)  # of the difference of two frequencies, at most
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 4.5 * noise
    means = [borders(masks).mean() for masks in (ours, theirs)]
    deviation = math.hypot(borders(ours).std(), borders(theirs).std()) / math.sqrt(1500)
    assert abs(means[0] - means[1]) < 4 * deviation


def test_block_masks_are_less_scattered_than_random_ones():
    blocks = hidden_blocks((14, 14), 98, batch=50)
    scattered = random_scores(seeded())(torch.zeros(50, 196, 1)).view(-1, 14, 14) < 0.5
    assert borders(blocks.numpy()).mean() < 0.6 * borders(scattered.numpy()).mean()


# --- Gumbel top-k ----------------------------------------------------------------------------


def plackett_luce(scores: list[float], k: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every ordered draw of k patches without replacement."""
    odds = [s ** (1 / temperature) for s in scores]
    probabilities = {}
    for draw in permutations(range(len(scores)), k):
        left, probability = sum(odds), 1.0
        for j in draw:
            probability *= odds[j] / left
            left -= odds[j]
        probabilities[draw] = probability
    return probabilities


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gumbel_keys_draw_with_plackett_luce_probabilities(k, temperature):
    scores, num_draws = [0.1, 0.35, 0.6, 0.9], 20000
    keys = gumbel_keys(torch.tensor([scores]).expand(num_draws, 4), temperature, seeded())
    draws = [tuple(row) for row in keys.topk(k).indices.tolist()]
    for draw, probability in plackett_luce(scores, k, temperature).items():
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(draws.count(draw) - num_draws * probability) < 4 * deviation + 1, draw


def test_temperature_zero_is_the_deterministic_order_ties_included():
    tied = torch.rand(8, 50, generator=seeded()).mul(20).round() / 20
    close = 0.3 + torch.randperm(50, generator=seeded()) * 2**-25  # neighbours in float32
    scores = torch.cat([tied, close[None]])
    keys = gumbel_keys(scores, 0.0, seeded())
    expected = [sorted(range(50), key=row.__getitem__) for row in scores.tolist()]
    assert keys.argsort(dim=1, stable=True).tolist() == expected


def test_a_high_temperature_draws_uniformly():
    scores = torch.tensor([0.001, 0.1, 0.5, 0.999]).expand(20000, 4)
    first = gumbel_keys(scores, 1e4, seeded()).argmax(dim=1)
    assert (first.bincount() - 5000).abs().max() < 4 * math.sqrt(20000 * 0.25 * 0.75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gumbel_keys_are_finite_wide_and_the_callers_draws(dtype):
    scores = torch.tensor([0.0, 1.0, 0.5, 0.5], dtype=dtype, requires_grad=True)
    scores = scores.expand(5000, 4)
    keys = gumbel_keys(scores, 1.0, seeded(3))
    assert keys.isfinite().all() and not keys.requires_grad
    assert keys.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (keys.argmin(dim=1) == 0).all()  # nothing is below a score of 0
    before = torch.get_rng_state()
    assert torch.equal(keys, gumbel_keys(scores, 1.0, seeded(3)))
    assert torch.equal(before, torch.get_rng_state())


# --- inspection ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_keep", [None, 7])
@pytest.mark.parametrize("trainable", [False, True])
def test_chosen_masks_are_those_of_the_forward_pass(num_keep, trainable):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 24, "decoder_embed_dim": 8, "decoder_num_heads": 2}
    model = MaskedAutoencoder(
        image_size=(12, 15), patch_size=3, num_heads=3, depth=1, decoder_depth=1,
        trainable_positions=trainable, **sizes,
    )  # fmt: skip
    network, images = LightMaskingNetwork(24, 16), torch.randn(3, 3, 12, 15)
    out = model(images, scorer=network, num_keep=num_keep)
    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_pre_hook(lambda *_: pytest.fail("a block ran"))
    masks = choose_masks(model, images, network, num_keep)
    assert torch.equal(masks.scores, out["scores"]) and not masks.scores.requires_grad
    assert torch.equal(masks.mask, out["mask"]) and masks.mask.sum() == 3 * (20 - (num_keep or 5))
    for scores, order, mask in zip(*(part.tolist() for part in masks), strict=True):
        assert order == sorted(range(20), key=scores.__getitem__)
        assert [mask[j] for j in order] == [0] * (num_keep or 5) + [1] * (20 - (num_keep or 5))
