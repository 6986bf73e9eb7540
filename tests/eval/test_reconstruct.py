import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_ffcv import open_eval_loader
from eval import reconstruct
from eval.frozen.encoders import of_run
from eval.frozen.features import ImageSet, eval_augmentation
from eval.reconstruct import random_masks, reconstruction_error
from mlomae.pretraining.networks import load_masking_network, load_model

CPU = torch.device("cpu")


def patches_of(images: np.ndarray, size: int) -> np.ndarray:
    """[B, 3, H, W] -> [B, N, size, size, 3], by loops."""
    batch, _, height, width = images.shape
    return np.stack(
        [
            images[:, :, y : y + size, x : x + size].transpose(0, 2, 3, 1)
            for y in range(0, height, size)
            for x in range(0, width, size)
        ],
        axis=1,
    ).reshape(batch, -1, size, size, 3)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_error_is_the_mean_over_hidden_patches(run, data, norm_pix_loss):
    encoder, images = of_run(run), ImageSet(data["test"])
    encoder.model.norm_pix_loss = norm_pix_loss
    errors = reconstruction_error(encoder, images, random_masks(3), 0.75, CPU)

    model, recipe = load_model(run)
    loader = open_eval_loader(
        data["test"], augmentation=eval_augmentation(images.info, 16), batch_size=15,
        mean=recipe.data.mean, std=recipe.data.std,
    )  # fmt: skip
    pixels, _ = next(iter(loader))
    with torch.no_grad():
        out = model(pixels, scorer=random_masks(3)(0))
    assert out["mask"].sum(dim=1).tolist() == [12] * 15
    target = patches_of(pixels.double().numpy(), 4)
    prediction = out["prediction"].double().numpy().reshape(15, 16, 4, 4, 3)
    hidden = out["mask"].bool().numpy()
    std = np.array(recipe.data.std)
    pixel_error = (((prediction - target) * std)[hidden] ** 2).mean()
    if norm_pix_loss:
        flat = target.reshape(15, 16, -1)
        centre, spread = flat.mean(-1, keepdims=True), flat.var(-1, ddof=1, keepdims=True)
        target = ((flat - centre) / np.sqrt(spread + 1e-6)).reshape(target.shape)
    assert errors["patch_error"] == pytest.approx(
        ((prediction - target)[hidden] ** 2).mean(), rel=1e-5
    )
    assert ("pixel_error" in errors) == (not norm_pix_loss)
    if not norm_pix_loss:
        assert errors["pixel_error"] == pytest.approx(pixel_error, rel=1e-5)


def read(run):
    return json.loads((run / "eval" / "reconstruct" / "result.json").read_text())


def test_a_run_shows_random_and_learned_masks(run, data):
    flags = ["--checkpoint", str(run), "--test", data["test"]]
    assert reconstruct.main([*flags, "--num_pictures", "4"]) == 0
    result = read(run)
    assert (result["settings"]["mask_ratio"], result["num_hidden_patches"]) == (0.75, 12)
    network = load_masking_network(run)
    learned = reconstruction_error(
        of_run(run), ImageSet(data["test"]), lambda _: network, 0.75, CPU
    )
    assert result["patch_error_learned"] == pytest.approx(learned["patch_error"], rel=1e-6)
    assert result["patch_error_random"] != result["patch_error_learned"]
    for kind in ("random", "learned"):
        picture = np.asarray(Image.open(run / "eval" / "reconstruct" / f"{kind}.png"))
        assert picture.shape == (4 + 4 * 116, 4 + 4 * 116, 3) and picture.std() > 10

    assert reconstruct.main([*flags, "--mask_ratio", "0.5", "--seed", "1"]) == 0
    assert read(run)["num_hidden_patches"] == 8
    assert reconstruct.main([*flags, "--untrained"]) == 0


def test_learned_masks_are_scored_in_bf16_as_well(run, data):
    flags = ["--checkpoint", str(run), "--test", data["test"]]
    assert reconstruct.main(flags) == 0
    full = json.loads((run / "eval" / "reconstruct" / "result.json").read_text())
    assert reconstruct.main([*flags, "--precision", "bf16"]) == 0
    half = json.loads((run / "eval" / "reconstruct" / "result.json").read_text())
    assert half["precision"] == "bf16"
    assert half["patch_error_learned"] == pytest.approx(full["patch_error_learned"], rel=0.05)


def test_other_peoples_weights_need_their_decoder(run, foreign, data, tmp_path, capsys):
    flags = ["--test", data["test"], "--output_dir", str(tmp_path / "out")]
    assert reconstruct.main([*flags, "--init_from", str(foreign)]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["norm_pix_loss"] and "pixel_error_random" not in result
    assert reconstruct.main([*flags, "--init_from", str(foreign), "--no-norm_pix_loss"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not result["norm_pix_loss"] and result["pixel_error_random"] > 0
    assert "patch_error_learned" not in result

    capsys.readouterr()
    alone = tmp_path / "encoder"
    shutil.copytree(foreign, alone)
    tensors = load_file(foreign / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(("decoder", "mask_token"))}
    save_file(kept, alone / "model.safetensors")
    assert reconstruct.main([*flags, "--init_from", str(alone)]) == 2
    error = capsys.readouterr().err
    assert "holds no decoder: give weights that have one" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mask_ratio", "0.95"], "--mask_ratio 0.95 leaves none of the 16 patches visible"),
        (["--no-norm_pix_loss"], "--norm_pix_loss is for --init_from"),
    ],
)
def test_bad_input_is_one_sentence(run, data, capsys, flags, sentence):
    assert reconstruct.main(["--checkpoint", str(run), "--test", data["test"], *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
