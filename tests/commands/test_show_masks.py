"""The show-masks command, on small runs with random weights and small image files."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mlomae import __main__
from mlomae.commands.show_masks import command as show_masks
from mlomae.errors import UserError
from mlomae.models import block_scores, random_scores
from mlomae.pretraining.networks import (
    build_masking_network,
    build_model,
    load_masking_network,
    load_model,
)
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import dump_recipe, load_recipe
from tests.pretraining.test_pictures import Bytes, cells, patch_grid

HEIGHT, WIDTH = 8, 16
ROWS, COLUMNS, NUM_PATCHES = 4, 8, 32
SMALL = [
    "model.image_size=[8,16]", "model.patch_size=2", "model.embed_dim=16", "model.depth=1",
    "model.num_heads=2", "model.decoder_embed_dim=16", "model.decoder_depth=1",
]  # fmt: skip


def write_run(folder: Path, name: str, *overrides: str) -> PretrainingRecipe:
    """A run with one checkpoint, whose weights are not those of the recipe's seed."""
    recipe = load_recipe(name, PretrainingRecipe, [*SMALL, *overrides])
    checkpoint = folder / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    other = load_recipe(name, PretrainingRecipe, [*SMALL, *overrides, "seed=99"])
    save_file(build_model(other).state_dict(), checkpoint / "model.safetensors")
    if recipe.method == "mlo_mae":
        network = build_masking_network(other)
        save_file(network.state_dict(), checkpoint / "masking.safetensors")
    return recipe


@pytest.fixture
def run(tmp_path) -> Path:
    write_run(tmp_path / "run", "quickstart_mlo_mae")
    return tmp_path / "run"


def pixels(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Bytes:
    values = np.random.default_rng(seed).integers(256, size=(height, width, 3))
    return values.astype(np.uint8)


@pytest.fixture
def images(tmp_path) -> Path:
    """Five images in the order of their seeds, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b/a.BMP", "b/b.png", "c.webp", "d.png"]):
        Image.fromarray(pixels(seed)).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    return folder


def drawn(file: Path, rows: int) -> Bytes:
    """The picture's images, [rows, 4, 8, 16, 3]."""
    with Image.open(file) as picture:
        shown = cells(np.asarray(picture), rows)
    factor = shown.shape[2] // HEIGHT
    return shown[:, :, ::factor, ::factor]


def visible(row: Bytes) -> list[int]:
    """The patches of one row's third image which show the first."""
    image, _, seen, _ = (patch_grid(cell, ROWS, COLUMNS) for cell in row)
    return np.flatnonzero((image == seen).all(axis=(1, 2, 3))).tolist()


# --- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "light"])
def test_the_networks_highest_scores_are_hidden(tmp_path, images, network):
    recipe = write_run(
        tmp_path / "run", "quickstart_mlo_mae", f"masking.network={network}",
        "masking.selection=gumbel_top_k", "masking.mask_ratio_end=0.5",
    )  # fmt: skip
    file = tmp_path / "masks.png"
    sentence = show_masks.draw(tmp_path / "run", images, file, 4)
    assert sentence == f"{file}: 4 of 5 images, 16 of 32 patches visible"
    model, network = load_model(tmp_path / "run")[0], load_masking_network(tmp_path / "run")
    for seed, row in enumerate(drawn(file, rows=4)):
        assert np.array_equal(row[0], pixels(seed))
        image = (pixels(seed) / 255 - np.array(recipe.data.mean)) / np.array(recipe.data.std)
        with torch.no_grad():
            scores = network(model.embed(torch.tensor(image).permute(2, 0, 1)[None].float()))[0]
        assert visible(row) == sorted(scores.argsort()[:16].tolist())


@pytest.mark.parametrize("network", ["random", "block"])
def test_masks_that_nothing_learned_are_those_of_the_seed(tmp_path, images, network):
    recipe = write_run(tmp_path / "run", "quickstart_mae", f"masking.network={network}", "seed=3")
    show_masks.draw(tmp_path / "run", images, tmp_path / "masks.png", 8)
    generator = torch.Generator().manual_seed(recipe.seed)
    block = block_scores((ROWS, COLUMNS), 24, generator)
    scorer = random_scores(generator) if network == "random" else block
    expected = scorer(torch.zeros(5, NUM_PATCHES, 1)).argsort(dim=1)[:, :8]
    rows = drawn(tmp_path / "masks.png", rows=5)
    assert [visible(row) for row in rows] == [sorted(row) for row in expected.tolist()]


# --- which images ----------------------------------------------------------------------------


def read(path: Path) -> Bytes:
    (image,) = show_masks.read_images([path], (HEIGHT, WIDTH))
    return image


def test_the_middle_of_an_image_is_taken(tmp_path):
    for name, shape, part in (
        ("wide", (HEIGHT, 40), np.s_[:, 12:28]),
        ("high", (30, WIDTH), np.s_[11:19, :]),
    ):
        image = pixels(0, *shape)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        assert np.array_equal(read(tmp_path / f"{name}.png"), image[part])


def test_an_image_is_resized_to_its_shorter_side_without_aliasing(tmp_path):
    ramp = np.linspace(70, 190, 60)  # the middle 48 columns become 16
    stripes = np.tile([30, -60, 30], 20)  # too fine for 16 columns
    image = np.broadcast_to((ramp + stripes)[None, :, None], (24, 60, 3)).round().astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "ramp.png")
    expected = ramp[6:54].reshape(16, 3).mean(axis=1)
    inner = read(tmp_path / "ramp.png")[:, 1:-1, :]
    assert np.abs(inner - expected[None, 1:-1, None]).max() <= 3


def test_images_are_turned_upright_and_made_rgb(tmp_path):
    upright = pixels(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn it clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png"), upright)
    grey = pixels(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read(tmp_path / "grey.png"), np.stack([grey] * 3, axis=-1))


def test_images_that_cannot_be_read_are_named_and_left_out(run, images, tmp_path, caplog):
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:100])
    (images / "aa.jpg").write_text("no image")
    with caplog.at_level(logging.WARNING):
        sentence = show_masks.draw(run, images, tmp_path / "masks.png", 8)
    assert "4 of 6 images" in sentence
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"left out {images / 'a.png'}",
        f"left out {images / 'aa.jpg'}",
    ]
    rows = drawn(tmp_path / "masks.png", rows=4)
    assert all(np.array_equal(row[0], pixels(1 + i)) for i, row in enumerate(rows))


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m mlomae show-masks` here: exit code, stdout, stderr."""
    monkeypatch.setattr(show_masks, "set_up_logging", lambda: None)  # pytest's handlers stay

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlomae", "show-masks", *map(str, arguments)])
        return (__main__.main(), *capsys.readouterr())

    return call


def test_the_picture_lies_in_the_run_and_is_replaced(run, images, command):
    file = run / "masks_photos.png"
    assert command(run, "--images", images, "--num_images", 2) == (
        0, f"{file}: 2 of 5 images, 8 of 32 patches visible\n", "",
    )  # fmt: skip
    drawn(file, rows=2)
    assert command(run, "--images", images)[0] == 0
    drawn(file, rows=5)
    assert command(run / "checkpoints" / "step_00000007", "--images", images)[0] == 0
    drawn(run / "masks_photos_step_00000007.png", rows=5)


def test_output_is_where_the_picture_goes(run, images, command, tmp_path):
    file = tmp_path / "new" / "picture.JPG"
    assert command(run, "--images", images, "--output", file)[0] == 0
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
    assert not list(run.glob("*.png"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"--images": "nowhere"}, "--images nowhere is no folder"),
        ({"--images": "run"}, "--images run holds no image (.bmp, .jpeg, .jpg, .png, .webp)"),
        ({"--images": "broken"}, "none of the 1 images in broken can be read"),
        ({"--num_images": "0"}, "--num_images is 0"),
        ({"--output": "masks.yaml"}, "--output masks.yaml has no ending of an image file"),
        ({"--output": "run/checkpoints/step_00000007/recipe.yaml/a.png"}, "cannot be written"),
        ({"--output": "folder.png"}, "folder.png cannot be written"),
        ({"RUN": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(run, images, command, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in ("broken", "folder.png"):
        Path(folder).mkdir()
    Path("broken/a.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    options = {"RUN": "run", "--images": "photos"} | flags
    arguments = [options.pop("RUN"), *(part for flag in options.items() for part in flag)]
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_another_masking_network_are_refused(run, images, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000007"
    recipe = load_recipe("quickstart_mlo_mae", PretrainingRecipe, [*SMALL, "masking.network=light"])
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(UserError, match=r"masking\.safetensors does not hold the weights"):
        show_masks.draw(run, images, tmp_path / "masks.png", 1)
