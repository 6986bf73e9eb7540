"""The masked autoencoder, against a plain numpy one and against timm's ViT."""

from functools import partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.models import (
    MaskedAutoencoder,
    MaskingNetwork,
    Scorer,
    random_scores,
    reconstruction_loss,
)
from tests.models.plain_mae import PlainMae

SIZES: dict[str, Any] = {
    "image_size": 12, "patch_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2,
    "mlp_ratio": 3.0, "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3,
}  # fmt: skip
NUM_PATCHES, NUM_KEPT = 16, 4


def build(**changes: Any) -> MaskedAutoencoder:
    """A small float64 model, whose every value is random: no gain of 1, no bias of 0."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(**(SIZES | changes)).double()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 3) -> Tensor:
    return draw(batch, 3, 12, 12)


def fixed(scores: Tensor) -> Scorer:
    return lambda _: scores


def plain(model: MaskedAutoencoder) -> PlainMae:
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    return PlainMae(weights, SIZES["patch_size"], SIZES["num_heads"], SIZES["decoder_num_heads"])


# --- patches and targets ---------------------------------------------------------------------


def test_patchify_runs_over_rows_columns_channels():
    pictures = images(2)
    patches = build().patchify(pictures)
    assert patches.shape == (2, NUM_PATCHES, 27)
    for b, image in enumerate(pictures):
        assert np.array_equal(patches[b], plain(build()).targets(image.numpy(), normalise=False))


def test_unpatchify_undoes_patchify():
    model, pictures = build(), images()
    assert torch.equal(model.unpatchify(model.patchify(pictures)), pictures)


# --- which patches are hidden ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "ratio", "kept"),
    [(14, 0.75, 49), (16, 0.75, 64), (7, 0.75, 12), (14, 0.9, 19), (5, 0.5, 12)],
)
def test_number_of_kept_patches(side, ratio, kept):
    with torch.device("meta"):
        model = MaskedAutoencoder(
            **(SIZES | {"image_size": side, "patch_size": 1}), mask_ratio=ratio
        )
    assert (model.num_patches, model.num_keep) == (side**2, kept)


def test_the_smallest_scores_stay_visible():
    scores = draw(3, NUM_PATCHES)
    out = build()(images(), scorer=fixed(scores))
    for row, mask in zip(scores.tolist(), out["mask"].tolist(), strict=True):
        hidden = sorted(range(NUM_PATCHES), key=lambda j: row[j])[NUM_KEPT:]
        assert mask == [float(j in hidden) for j in range(NUM_PATCHES)]
    assert out["scores"] is scores


def test_the_number_of_visible_patches_may_be_given_for_a_pass():
    model, scores = build(), draw(3, NUM_PATCHES)
    for num_keep in (1, 7, 15):
        out = model(images(), scorer=fixed(scores), num_keep=num_keep)
        hidden = scores.argsort(dim=1)[:, num_keep:]
        assert torch.equal(out["mask"], torch.zeros(3, NUM_PATCHES).double().scatter(1, hidden, 1))
    assert model.num_keep == NUM_KEPT


def test_only_visible_patches_reach_the_prediction():
    model, pictures, scores = build(), images(1), draw(1, NUM_PATCHES)
    before = model(pictures, scorer=fixed(scores))
    for j in range(NUM_PATCHES):
        patches = model.patchify(pictures)
        patches[:, j] += 1
        after = model(model.unpatchify(patches), scorer=fixed(scores))
        unseen = torch.equal(after["prediction"], before["prediction"])
        assert unseen == bool(before["mask"][0, j]), j


def test_the_scorer_sees_detached_patches_with_positions():
    model, pictures, seen = build(), images(), []

    def scorer(embedding: Tensor) -> Tensor:
        seen.append(embedding)
        return draw(3, NUM_PATCHES)

    out = model(pictures, scorer=scorer)
    expected = [plain(model).embed(image) for image in pictures.numpy()]
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert not seen[0].requires_grad
    assert torch.equal(out["embedding"], seen[0]) and not out["embedding"].requires_grad
    model(pictures, scorer=scorer, coupled=True)
    assert torch.equal(seen[1], seen[0]) and seen[1].requires_grad


# --- plain MAE -------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_loss_is_that_of_plain_mae(normalise, ratio):
    model = build(norm_pix_loss=normalise, mask_ratio=ratio)
    pictures, noise = images(), draw(3, NUM_PATCHES, seed=2)
    out = model(pictures, scorer=fixed(noise))
    loss = reconstruction_loss(out["patch_loss"], out["mask"])
    expected = plain(model).loss(pictures.numpy(), noise.numpy(), ratio, normalise)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_every_patch_is_predicted_and_judged_at_its_place():
    model, pictures, noise = build(), images(), draw(3, NUM_PATCHES, seed=3)
    out = model(pictures, scorer=fixed(noise))
    for b, image in enumerate(pictures.numpy()):
        visible = noise[b].argsort()[:NUM_KEPT].tolist()
        prediction = plain(model).predict(image, visible)
        error = prediction - plain(model).targets(image, normalise=True)
        np.testing.assert_allclose(out["prediction"][b].detach(), prediction, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(
            out["patch_loss"][b].detach(), (error**2).mean(axis=1), rtol=1e-10
        )


def test_order_among_the_visible_and_among_the_hidden_does_not_matter():
    model, pictures, scores = build(), images(), draw(3, NUM_PATCHES)
    reversed_within = torch.where(scores.argsort(dim=1).argsort(dim=1) < NUM_KEPT, -9.0, 9.0)
    one, other = (model(pictures, scorer=fixed(s)) for s in (scores, reversed_within - scores))
    assert torch.equal(one["mask"], other["mask"])
    torch.testing.assert_close(one["prediction"], other["prediction"], rtol=1e-10, atol=1e-12)


def test_loss_counts_hidden_patches_of_the_whole_batch():
    mask = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    patch_loss = torch.tensor([[1.0, 2.0, 3.0], [50.0, 60.0, 10.0]])
    weights = torch.tensor([[0.5, 0.0, 1.0], [7.0, 7.0, 0.1]])
    assert float(reconstruction_loss(patch_loss, mask)) == (1 + 2 + 3 + 10) / 4
    weighted = float(reconstruction_loss(patch_loss * weights, mask))
    assert weighted == pytest.approx((0.5 + 0 + 3 + 1) / 4, rel=1e-7)  # not divided by 1.6


def test_weights_of_one_in_random_order_are_plain_mae_to_the_bit():
    def trained(weighted: bool) -> tuple[list[Tensor], list[Tensor]]:
        model, losses = build().float(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            out = model(images().float(), scorer=random_scores(generator))
            weights = torch.ones_like(out["scores"]) if weighted else 1
            loss = reconstruction_loss(out["patch_loss"] * weights, out["mask"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, list(model.parameters())

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert all(map(torch.equal, ours, theirs))


# --- features --------------------------------------------------------------------------------


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize(("size", "channels"), [((12, 12), 3), ((6, 15), 1)])
def test_features_are_those_of_timms_vit_and_of_plain_numpy(global_pool, size, channels):
    model = build(image_size=size, in_chans=channels, global_pool=global_pool)
    pictures = draw(3, channels, *size)
    vit = VisionTransformer(
        img_size=size, patch_size=3, in_chans=channels, num_classes=0, global_pool=global_pool,
        fc_norm=False, embed_dim=16, depth=2, num_heads=2, mlp_ratio=3.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double().eval()  # fmt: skip
    ours = model.state_dict()
    vit.load_state_dict({name: ours[name] for name in vit.state_dict()})
    features = model(pictures)
    torch.testing.assert_close(features, vit(pictures), rtol=1e-11, atol=1e-12)
    tokens = np.array([plain(model).tokens(image) for image in pictures.numpy()])
    expected = tokens[:, 0] if global_pool == "token" else tokens[:, 1:].mean(axis=1)
    np.testing.assert_allclose(features.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("size", "channels"), [((6, 15), 1), ((15, 9), 4)])
def test_images_need_be_neither_square_nor_coloured(size, channels):
    model = build(image_size=size, in_chans=channels)
    assert model.grid_size == (size[0] // 3, size[1] // 3)
    pictures, noise = draw(2, channels, *size), draw(2, model.num_patches)
    assert torch.equal(model.unpatchify(model.patchify(pictures)), pictures)
    out = model(pictures, scorer=fixed(noise))
    loss = reconstruction_loss(out["patch_loss"], out["mask"]).item()
    expected = plain(model).loss(pictures.numpy(), noise.numpy(), 0.75, True)
    assert loss == pytest.approx(expected, rel=1e-12)


# --- stochastic depth ------------------------------------------------------------------------


def test_drop_path_rises_over_the_encoder_and_spares_the_decoder():
    model = build(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert not any(hasattr(b.drop_path1, "drop_prob") for b in model.decoder_blocks)
    first, second = model.train()(images()), model(images())
    assert not torch.equal(first, second)
    model.eval()
    kept = build(depth=5).eval()
    kept.load_state_dict(model.state_dict())
    assert torch.equal(model(images()), kept(images()))


# --- memory and precision --------------------------------------------------------------------


def loss_and_gradients(model: MaskedAutoencoder) -> tuple[Tensor, list[Tensor], list[int]]:
    """One weighted pass, with the number of times that each block ran."""
    runs = [0] * 4

    def count(i: int, *_: Any) -> None:
        runs[i] += 1

    for i, block in enumerate([*model.blocks, *model.decoder_blocks]):
        block.register_forward_pre_hook(partial(count, i))
    scores = draw(3, NUM_PATCHES).sigmoid()
    out = model(images(), scorer=fixed(scores))
    loss = reconstruction_loss(out["patch_loss"] * scores, out["mask"])
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], runs


def test_activation_checkpointing_changes_neither_loss_nor_gradient():
    loss, gradients, runs = loss_and_gradients(build())
    saving = build(activation_checkpointing=True)
    other_loss, other_gradients, other_runs = loss_and_gradients(saving)
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, gradients, other_gradients))
    assert (runs, other_runs) == ([1] * 4, [2] * 4)  # each block really ran again
    with torch.no_grad():
        assert torch.equal(saving(images()), build()(images()))


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # C++ takes a minute
)
def test_compiled_blocks_change_neither_loss_nor_gradient(backend, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    loss, gradients, _ = loss_and_gradients(build(depth=1, decoder_depth=1))
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    compiled = build(depth=1, decoder_depth=1, compile_blocks=True)
    other_loss, other_gradients, _ = loss_and_gradients(compiled)
    assert frames["ok"] > before and frames["ok"] == frames["total"]
    torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32])
def test_losses_and_scores_of_a_bfloat16_model_are_float32(buffers):
    model, pictures = build().float(), images().float()
    scorer = MaskingNetwork(NUM_PATCHES, 16, hidden_dim=8)
    exact = model(pictures, scorer=scorer)
    half_model, half_scorer = model.bfloat16(), scorer.bfloat16()
    for value in half_model.buffers():  # DeepSpeed leaves them as they are
        value.data = value.to(buffers)
    half = half_model(pictures, scorer=half_scorer)
    kinds = {name: value.dtype for name, value in half.items()}
    assert kinds.pop("restore") == torch.int64
    wide = dict.fromkeys(("patch_loss", "scores", "mask"), torch.float32)
    assert kinds == wide | dict.fromkeys(("embedding", "prediction"), torch.bfloat16)
    torch.testing.assert_close(half["scores"], exact["scores"], rtol=0.02, atol=0)

    same = half_model(pictures, scorer=fixed(exact["scores"]))
    torch.testing.assert_close(same["patch_loss"], exact["patch_loss"], rtol=0.1, atol=0)
    assert half_model(pictures).dtype == torch.bfloat16
