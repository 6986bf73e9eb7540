"""The same weights compute the same in our model as in transformers' and timm's."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from mlomae.foreign import infer_architecture, load_weights, read_weights
from mlomae.models import MaskedAutoencoder, reconstruction_loss
from tests.foreign.published import to_mae_ct_decoder, to_mae_ct_encoder

NO_DECODER = ["decoder*", "mask_token"]
SMALL_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1}
SIZES = {
    "small": {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_attention_heads": 4},
    "large": {"image_size": 48, "patch_size": 8, "hidden_size": 96, "num_attention_heads": 6},
}
DEPTH = {"small": 2, "large": 3}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def config(cls: type, size: str, **settings):
    sizes, decoder = SIZES[size], {}
    if cls is ViTMAEConfig:
        decoder = {
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": DEPTH[size] - 1,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 4 * 32,
        }
    return cls(
        **sizes,
        **decoder,
        num_hidden_layers=DEPTH[size],
        intermediate_size=4 * sizes["hidden_size"],
        layer_norm_eps=1e-6,
        **settings,
    )


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give every parameter, also positions and norms, values that a mix-up would betray."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.to(dtype).eval()


def images(size: str, dtype: torch.dtype) -> Tensor:
    side = SIZES[size]["image_size"]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def ours_from(path, dtype: torch.dtype, *, expected=(), **settings) -> MaskedAutoencoder:
    architecture = infer_architecture(read_weights(path)) | settings
    model = MaskedAutoencoder(**architecture).to(dtype)
    load_weights(model, [path], expected=expected)
    return model.eval()


# --- transformers ------------------------------------------------------------------------------


@every_size
@every_dtype
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_reconstruction_equal_transformers(size, dtype, norm_pix_loss, tmp_path):
    theirs = ViTMAEForPreTraining(config(ViTMAEConfig, size, norm_pix_loss=norm_pix_loss))
    randomised(theirs, dtype).save_pretrained(tmp_path)
    ours = ours_from(tmp_path, dtype, norm_pix_loss=norm_pix_loss)
    batch = images(size, dtype)
    noise = torch.rand(3, ours.num_patches, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(batch, noise=noise)
        out = ours(batch, scorer=lambda _: noise)
    loss = reconstruction_loss(out["patch_loss"], out["mask"].to(dtype))
    assert out["prediction"].dtype == dtype
    assert torch.equal(out["mask"], expected.mask.to(out["mask"].dtype))
    close = partial(torch.testing.assert_close, rtol=0, atol=TOLERANCE[dtype])
    close(loss, expected.loss)
    close(out["prediction"], expected.logits)


@every_size
@every_dtype
def test_features_equal_transformers(size, dtype, tmp_path):
    theirs = randomised(ViTMAEForPreTraining(config(ViTMAEConfig, size, mask_ratio=0.0)), dtype)
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path, dtype)
    batch = images(size, dtype)
    in_order = torch.arange(ours.num_patches).expand(3, -1)  # they permute at ratio 0 as well
    with torch.no_grad():
        expected = theirs.vit(batch, noise=in_order).last_hidden_state
        features, pooled = ours.forward_features(batch), ours(batch)
    torch.testing.assert_close(features, expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(pooled, expected[:, 0], rtol=0, atol=TOLERANCE[dtype])


@every_dtype
def test_an_encoder_without_decoder_equals_transformers(dtype, tmp_path):
    theirs = ViTModel(config(ViTConfig, "small"), add_pooling_layer=False)
    randomised(theirs, dtype).save_pretrained(tmp_path)
    ours = ours_from(tmp_path, dtype, expected=NO_DECODER, **SMALL_DECODER)
    batch = images("small", dtype)
    with torch.no_grad():
        expected = theirs(batch).last_hidden_state
        features = ours.forward_features(batch)
    torch.testing.assert_close(features, expected, rtol=0, atol=TOLERANCE[dtype])


# --- timm --------------------------------------------------------------------------------------


@every_size
@every_dtype
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_equal_timm(size, dtype, pool, tmp_path):
    sizes = SIZES[size]
    architecture = {
        "patch_size": sizes["patch_size"],
        "embed_dim": sizes["hidden_size"],
        "depth": DEPTH[size],
        "num_heads": sizes["num_attention_heads"],
        "global_pool": pool,
    }
    side = sizes["image_size"]
    theirs = VisionTransformer(img_size=side, num_classes=0, fc_norm=False, **architecture)
    torch.save(randomised(theirs, dtype).state_dict(), tmp_path / "vit.pth")
    ours = MaskedAutoencoder(image_size=side, **architecture, **SMALL_DECODER).to(dtype).eval()
    load_weights(ours, [tmp_path / "vit.pth"], expected=NO_DECODER)
    batch = images(size, dtype)
    with torch.no_grad():
        expected, pooled = theirs.forward_features(batch), theirs(batch)
        close = partial(torch.testing.assert_close, rtol=0, atol=TOLERANCE[dtype])
        close(ours.forward_features(batch), expected)
        close(ours(batch), pooled)


# --- MAE-CT ------------------------------------------------------------------------------------


def test_moving_the_class_row_leaves_the_function(tmp_path):
    """An encoder with a class row, in MAE-CT's two files and back, gives the same features."""
    settings = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    settings |= SMALL_DECODER
    model = randomised(MaskedAutoencoder(**settings, trainable_positions=True), torch.float64)
    with torch.no_grad():
        model.decoder_pos_embed[:, 0] = 0
    for name, write in (("encoder", to_mae_ct_encoder), ("decoder", to_mae_ct_decoder)):
        torch.save({"state_dict": write(model.state_dict())}, tmp_path / f"{name}.th")
    again = MaskedAutoencoder(**settings).double().eval()
    load_weights(again, [tmp_path / "encoder.th", tmp_path / "decoder.th"])
    batch, noise = images("small", torch.float64), torch.rand(3, 16)
    with torch.no_grad():
        assert not torch.equal(again.cls_token, model.cls_token)
        torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=1e-12)
        theirs, ours = (m(batch, scorer=lambda _: noise)["prediction"] for m in (model, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
