"""Names and shapes between our layout and the published ones, for every size of encoder."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from mlomae.errors import UserError
from mlomae.foreign import layouts
from mlomae.models import MaskedAutoencoder
from tests.foreign import published
from tests.foreign.published import SIZES, shapes_of, tensors_of

TINY = (32, 2, 4, 9, 16, 1)  # width, depth, patch, number of patches, decoder's width and depth
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def on_meta(build, *arguments, **settings):
    with torch.device("meta"):
        return build(*arguments, **settings)


def vit_config(cls, width, depth, patch, **settings):
    return cls(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=16,
        intermediate_size=4 * width,
        patch_size=patch,
        **settings,
    )


# --- the table against the libraries and our model ---------------------------------------------


@every_size
def test_ours_are_the_names_of_mae(size):
    width, depth, patch, _ = size
    model = on_meta(MaskedAutoencoder, embed_dim=width, depth=depth, patch_size=patch, num_heads=16)
    assert shapes_of(model.state_dict()) == published.mae(*size)


@every_size
def test_what_transformers_holds_in_memory_is_read(size):
    model = on_meta(ViTMAEForPreTraining, vit_config(ViTMAEConfig, *size[:3]))
    ours = layouts.from_hugging_face(model.state_dict())
    assert shapes_of(ours) == published.mae(*size)


@every_size
def test_an_encoder_of_transformers_is_read(size):
    config = vit_config(ViTConfig, *size[:3])
    ours = layouts.from_hugging_face(
        on_meta(ViTModel, config, add_pooling_layer=False).state_dict()
    )
    assert shapes_of(ours) == published.mae_encoder(*size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_base_patch16_224.mae", "B/16"),
        ("vit_large_patch16_224.mae", "L/16"),
        ("vit_huge_patch14_224.mae", "H/14"),
    ],
)
def test_timm_has_the_names_of_the_encoder(name, size):
    model = on_meta(timm.create_model, name, num_classes=0)
    full = tensors_of(published.mae(*SIZES[size]))
    assert shapes_of(layouts.to_timm(full)) == shapes_of(model.state_dict())


# --- each published layout, both ways ----------------------------------------------------------


@every_size
def test_mae(size):
    for shapes in (published.mae(*size), published.mae_encoder(*size)):
        assert layouts.detect_layout(tensors_of(shapes)) == "mae"
    assert layouts.detect_layout(tensors_of(published.mae_fine_tuned(*size))) == "mae"


@every_size
def test_hugging_face(size):
    theirs = tensors_of(published.hugging_face(*size))
    assert layouts.detect_layout(theirs) == "hugging_face"
    assert shapes_of(layouts.from_hugging_face(theirs)) == published.mae(*size)
    ours = tensors_of(published.mae(*size))
    assert shapes_of(layouts.to_hugging_face(ours)) == published.hugging_face(*size)


@every_size
def test_mae_ct(size):
    width, _, patch, num_patches = size
    encoder = tensors_of(published.mae_ct_encoder(*size))
    decoder = tensors_of(published.mae_ct_decoder(*size))
    assert layouts.detect_layout(encoder) == "mae_ct_encoder"
    assert layouts.detect_layout(decoder) == "mae_ct_decoder"
    assert shapes_of(layouts.from_mae_ct_encoder(encoder)) == published.mae_encoder(*size)
    assert shapes_of(layouts.from_mae_ct_decoder(decoder)) == published.mae_decoder(
        width, patch, num_patches, 512, 8
    )
    ours = tensors_of(published.mae(*size))
    assert shapes_of(published.to_mae_ct_encoder(ours)) == published.mae_ct_encoder(*size)
    assert shapes_of(published.to_mae_ct_decoder(ours)) == published.mae_ct_decoder(*size)


@every_size
def test_tutorial(size):
    theirs = tensors_of(published.tutorial(*size))
    assert layouts.detect_layout(theirs) == "tutorial"
    ours = shapes_of(layouts.from_tutorial(theirs))
    assert ours == published.mae(*size) | {"decoder_pos_embed": (1, size[3], 512)}
    assert shapes_of(published.to_tutorial(tensors_of(ours))) == published.tutorial(*size)


@pytest.mark.parametrize("width", [768, 1024, 1280])
def test_heads_are_recognised(width):
    assert layouts.detect_layout(tensors_of(published.nnclr_head(width))) == "nnclr_head"
    for first in (0, 1):
        head = tensors_of(published.probe_head(width, first))
        assert layouts.detect_layout(head) == "probe_head"


def test_another_networks_names_are_unknown():
    assert layouts.detect_layout(tensors_of({"conv1.weight": (64, 3, 7, 7)})) == "unknown"


# --- the class row -----------------------------------------------------------------------------


def test_an_oblong_grid_is_not_taken_for_an_encoder_without_class_row():
    """14 x 16 patches and the class token make 225 positions, a square number."""
    shapes = published.mae_encoder(32, 1, 16, 224)
    state = tensors_of(shapes, "cpu")
    assert layouts.detect_layout(state, num_patches=224) == "mae"
    assert layouts.detect_layout(state, num_patches=225) == "mae_ct_encoder"
    state["pos_embed"][:, 0] = 0
    assert layouts.detect_layout(state) == "mae"


def test_the_class_row_moves_into_the_class_token():
    full = tensors_of(published.mae(*TINY), "cpu")
    encoder = published.to_mae_ct_encoder(full)
    assert torch.equal(encoder["cls_token"], full["cls_token"] + full["pos_embed"][:, :1])
    back = layouts.from_mae_ct_encoder(encoder)
    assert not back["pos_embed"][:, 0].any()
    assert torch.equal(back["pos_embed"][:, 1:], full["pos_embed"][:, 1:])


def test_a_class_row_that_mae_ct_cannot_hold_is_refused():
    full = tensors_of(published.mae(*TINY), "cpu")
    with pytest.raises(UserError, match=r"decoder_pos_embed .*model\.trainable_positions=false"):
        published.to_mae_ct_decoder(full)


# --- round trips, bit for bit ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "read", "write"),
    [
        (published.hugging_face, layouts.from_hugging_face, layouts.to_hugging_face),
        (published.mae_ct_encoder, layouts.from_mae_ct_encoder, published.to_mae_ct_encoder),
        (published.mae_ct_decoder, layouts.from_mae_ct_decoder, published.to_mae_ct_decoder),
        (published.tutorial, layouts.from_tutorial, published.to_tutorial),
        (published.mae_encoder, dict, layouts.to_timm),
    ],
    ids=["hugging_face", "mae_ct_encoder", "mae_ct_decoder", "tutorial", "timm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_are_inverse(shapes, read, write, dtype, tmp_path):
    encoder_only = shapes in (published.mae_ct_encoder, published.mae_encoder)
    state = tensors_of(shapes(*(TINY[:4] if encoder_only else TINY)), "cpu", dtype)
    ours = read(state)
    save_file(write(ours), tmp_path / "w.safetensors")
    back = load_file(tmp_path / "w.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    again = read(back)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_rows_of_the_joined_projection_are_query_key_value():
    theirs = tensors_of(published.hugging_face(*TINY), "cpu")
    ours = layouts.from_hugging_face(theirs)["decoder_blocks.0.attn.qkv.weight"]
    prefix = "decoder.decoder_layers.0.attention.attention"
    for part, rows in (("query", ours[:16]), ("key", ours[16:32]), ("value", ours[32:])):
        assert torch.equal(rows, theirs[f"{prefix}.{part}.weight"])


def test_a_projection_with_a_part_missing_keeps_their_names():
    theirs = tensors_of(published.hugging_face(*TINY), "cpu")
    del theirs["vit.encoder.layer.1.attention.attention.key.weight"]
    ours = layouts.from_hugging_face(theirs)
    assert "blocks.1.attn.qkv.weight" not in ours and "blocks.1.attn.query.weight" in ours


def test_an_older_mae_ct_decoder_has_a_class_row_already():
    positions = torch.cat([torch.zeros(1, 1, 4), torch.randn(1, 9, 4)], dim=1)
    older = {"mask_token": torch.ones(1, 1, 4), "embed.weight": torch.ones(4, 2),
             "pred.weight": torch.ones(3, 4)}  # fmt: skip
    tables = [
        layouts.from_mae_ct_decoder({**older, "pos_embed": rows})["decoder_pos_embed"]
        for rows in (positions, positions[:, 1:])
    ]
    assert torch.equal(tables[0], positions) and torch.equal(tables[1], positions)
