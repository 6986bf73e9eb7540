"""What segmentation refuses, in one sentence and before any work; and where it starts from."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_ffcv import DataError, WholeImages
from data_ffcv.convert import convert
from eval.segmentation import program as segmentation_program
from eval.segmentation.evaluate import load_trained
from eval.segmentation.task import split_weights
from mlomae.errors import UserError
from mlomae.foreign.layouts import to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.training.program import check_job, make_job
from tests.eval.segmentation.test_program import SegmentSetup


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> SegmentSetup:
    setup = SegmentSetup(tmp_path_factory.mktemp("refusals"))
    for name, part in (("renamed", "test"), ("fewer", "train")):
        for end in ("beton", "beton.json"):
            shutil.copy(setup.folder / f"{part}.{end}", setup.folder / f"{name}.{end}")
    for name, classes in (("renamed", ["0", "1", "2", "tree"]), ("fewer", ["0", "1"])):
        side = setup.folder / f"{name}.beton.json"
        side.write_text(json.dumps(json.loads(side.read_text()) | {"classes": classes}))
    save_file({"head.weight": torch.ones(3, 16)}, setup.folder / "head.safetensors")
    return setup


def check(setup: SegmentSetup, *overrides: str) -> None:
    launch = setup.launch("run", *overrides, method="plain")
    program = segmentation_program.SegmentationProgram()
    names = (launch[name] for name in ("recipe", "deepspeed_config", "resume", "overrides"))
    check_job(program, make_job(program.schema, *names))


def test_what_fits_is_not_refused(setup: SegmentSetup) -> None:
    check(setup)


CASES = {
    "class count": (["data.num_classes=5"], "data.num_classes is 5, but"),
    "class names": (["data.test={}/renamed.beton"], "the class '3' of"),
    "mask values": (
        ["data.num_classes=2", "data.train={}/fewer.beton"],
        "has masks with the value 3, but 2 classes (and 255 for none): convert",
    ),
    "no file": (["data.test={}/none.beton"], "none.beton does not exist"),
    "batch": (["segmentation.batch_size=32"], "segmentation.batch_size is 32, but"),
    "one image": (
        ["segmentation.gradient_accumulation_steps=8"],
        "segmentation.gradient_accumulation_steps is 8, which leaves one image",
    ),
    "views": (["segmentation.num_views=2"], "segmentation.num_views is 2"),
    "crop": (["model.image_size=18"], "model.image_size is 18, which patch_size 4 does not"),
    "one patch": (["model.image_size=[4, 16]"], "model.image_size has a side of one patch"),
    "depth": (["model.depth=3"], "model.depth is 3, but UperNet takes features of four"),
    "stride": (["inference.stride=17"], "inference.stride is [17, 17], larger than the window"),
    "whole": (["inference={mode: whole, stride: 8}"], "inference.stride is given, but mode whole"),
    "tutorial": (["head={preset: tutorial, channels: 16}"], "head.channels is 16, but preset"),
    "preset": (["head.preset=large"], "head.preset"),
    "scale": (["data.augmentation.scale=[0.5, 2]"], "data.augmentation.scale is [0.5, 2.0]"),
    "no weights": (["init_from=nowhere"], "nowhere"),
    "no encoder": (["init_from={}/head.safetensors"], "head.safetensors"),
    "method": (["method=mae"], "method is mae, but must be segmentation"),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses_in_one_sentence(setup: SegmentSetup, case: str) -> None:
    overrides, expected = CASES[case]
    with pytest.raises((UserError, DataError)) as caught:
        check(setup, *(override.replace("{}", str(setup.folder)) for override in overrides))
    assert expected in str(caught.value)


def test_images_without_masks_are_refused(setup: SegmentSetup, tmp_path: Path) -> None:
    """A folder of class folders, and the file made from it."""
    for name in ("cat", "dog"):
        shutil.copytree(setup.folder / "train" / "images", tmp_path / "pets" / name)
    convert("imagefolder", tmp_path / "pets", tmp_path / "pets.beton")
    for path in (tmp_path / "pets", tmp_path / "pets.beton"):
        with pytest.raises(UserError, match="holds no masks: give a file of"):
            check(setup, f"data.test={path}")


def test_a_mask_of_another_size_is_refused_by_the_conversion(
    setup: SegmentSetup, tmp_path: Path
) -> None:
    shutil.copytree(setup.folder / "test", tmp_path / "scenes")
    masks = tmp_path / "scenes" / "annotations"
    shutil.copy(masks / "0.png", masks / "1.png")
    with pytest.raises(DataError, match=r"1\.png is 26x20, but the image is 18x24; make them"):
        convert("segmentation", tmp_path / "scenes", tmp_path / "scenes.beton")


def test_ade20ks_numbers_move_down_by_one(tmp_path: Path) -> None:
    """1 to 150 become 0 to 149, and 0, which is no class, becomes 255."""
    values = np.arange(151, dtype=np.uint8).repeat(2).reshape(2, 151)
    for name, pixels in (("images", values[..., None].repeat(3, 2)), ("annotations", values)):
        (tmp_path / "ade" / name / "training").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "ade" / name / "training" / "a.png")
    info = convert(
        "segmentation", tmp_path / "ade", tmp_path / "a.beton", part="training", ignore_index=0
    )
    ((image, mask),) = WholeImages(tmp_path / "a.beton")
    assert info.num_classes == 150
    assert np.array_equal(mask, np.where(image[..., 0] == 0, 255, image[..., 0].astype(int) - 1))


def test_the_encoder_is_the_given_one(setup: SegmentSetup, tmp_path: Path) -> None:
    """Of another crop: positions are interpolated. Neck and head are the untrained ones."""
    torch.manual_seed(1)
    autoencoder = MaskedAutoencoder(
        image_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, decoder_embed_dim=8,
        decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    save_file(to_timm(autoencoder.state_dict()), tmp_path / "mae.safetensors")
    recipe = setup.read("plain", f"init_from={tmp_path / 'mae.safetensors'}")
    network, plain = (
        segmentation_program.initial_network(recipe),
        segmentation_program.build_network(recipe),
    )
    encoder = autoencoder.state_dict()
    for name, tensor in network.state_dict().items():
        stem = name.removeprefix("backbone.")
        if stem == name or "gamma" in name:
            assert torch.equal(tensor, plain.state_dict()[name])
        elif stem != "pos_embed":
            assert torch.equal(tensor, encoder[stem])
    assert all(torch.equal(block.ls1.gamma, torch.ones(16)) for block in network.backbone.blocks)
    assert network.backbone.pos_embed.shape == (1, 17, 16)


def test_weights_of_another_network_are_not_evaluated(setup: SegmentSetup, tmp_path: Path) -> None:
    recipe = setup.read("plain")
    network = segmentation_program.build_network(recipe)
    for file, tensors in split_weights(network.state_dict()).items():
        save_file(tensors, tmp_path / file)
    assert load_trained(network, str(tmp_path)) == tmp_path
    other = setup.read("plain", "head.channels=8")
    expected = (
        r"pooling\.cells\.0\.1\.0\.weight of shape \(16, 16, 1, 1\) and the recipe's network \(8,"
    )
    with pytest.raises(UserError, match=expected):
        load_trained(segmentation_program.build_network(other), str(tmp_path))
    (tmp_path / "segmentation.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*: give a run of eval/segment"):
        load_trained(network, str(tmp_path))
