"""The commands on a small untrained run and small image files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_ffcv import open_eval_loader
from data_ffcv.convert import convert
from eval import compare, knn, linear_probe
from eval.encoders import of_run, of_weights
from eval.features import ImageSets, eval_augmentation, extract_features
from mlomae.errors import UserError
from mlomae.foreign.files import read_config
from mlomae.recipe import dump_recipe, load_recipe
from mlomae.weights import build_model, load_model

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
OVERRIDES = [
    "model.image_size=16", "model.patch_size=4", "model.embed_dim=16", "model.depth=1",
    "model.decoder_embed_dim=16", "model.decoder_depth=1", "data.num_classes=3",
]  # fmt: skip


def make_beton(folder: Path, colours: dict, num_images: int, seed: int) -> Path:
    """Noisy images, each class of one colour, so that even random features tell them apart."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            pixels = np.clip(rng.normal(colour, 20, size=(16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    beton = folder.with_suffix(".beton")
    convert("imagefolder", folder, beton)
    return beton


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    two = dict(list(COLOURS.items())[:2])
    renamed = {"red": (0, 0, 0), "green": (0, 0, 0), "violet": (0, 0, 0)}
    return {
        "train": str(make_beton(folder / "train", COLOURS, 20, 0)),
        "test": str(make_beton(folder / "test", COLOURS, 5, 1)),
        "two": str(make_beton(folder / "two", two, 2, 2)),
        "renamed": str(make_beton(folder / "renamed", renamed, 2, 2)),
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one checkpoint, whose weights are not those of the recipe's seed."""
    recipe = load_recipe("quickstart_mlo_mae", OVERRIDES)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(dump_recipe(recipe))
    other = build_model(load_recipe("quickstart_mlo_mae", [*OVERRIDES, "seed=1"]))
    save_file(other.state_dict(), checkpoint / "model.safetensors")
    return tmp_path / "run"


def arguments(run: Path, data: dict[str, str], *more: str) -> list[str]:
    return ["--checkpoint", str(run), "--train", data["train"], "--test", data["test"], *more]


def test_features_are_those_of_the_whole_image_in_order(run, data):
    model, recipe = load_model(run)
    sets = ImageSets(data["train"], data["test"])
    loader = open_eval_loader(
        data["test"],
        augmentation=eval_augmentation(sets.test, 16),
        batch_size=4,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
    features, labels = extract_features(model, loader, torch.device("cpu"))
    assert labels.tolist() == sets.test.labels.tolist()
    images = torch.cat([images for images, _ in loader])
    torch.testing.assert_close(features, model(images).detach(), rtol=1e-4, atol=1e-5)


def test_small_images_are_taken_whole_and_others_cropped(data):
    info = ImageSets(data["train"], data["test"]).train
    assert eval_augmentation(info, 16).resize is None
    assert eval_augmentation(info, 224).resize == 256
    assert eval_augmentation(info, (16, 16)).resize is None
    assert eval_augmentation(info, (224, 448)).resize == (256, 512)


def test_a_subset_holds_every_class_in_proportion(data):
    sets = ImageSets(data["train"], data["test"], num_train_images=30)
    assert np.bincount(sets.train.labels[sets.train_indices]).tolist() == [10, 10, 10]
    assert ImageSets(data["train"], data["test"], num_train_images=60).train_indices is None


def test_knn_command_writes_its_result_beside_the_run(run, data, capsys):
    assert knn.main(arguments(run, data, "--k", "3", "--num_train_images", "30")) == 0
    result = json.loads((run / "eval" / "knn.json").read_text())
    assert result["accuracy"] > 0.9
    assert result["settings"] == {"k": 3, "temperature": 0.07}
    assert (result["num_train_images"], result["num_test_images"]) == (30, 15)
    assert result["checkpoint"] == str(run / "checkpoints" / "step_00000007")
    assert result["seconds"] > 0
    assert f"{100 * result['accuracy']:.2f} %" in capsys.readouterr().out


def test_linear_probe_command_takes_a_checkpoint_folder_and_untrained(run, data, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000007"
    assert linear_probe.main(arguments(checkpoint, data, "--untrained", "--epochs", "5")) == 0
    file = run / "eval" / "step_00000007" / "linear_probe_untrained.json"
    result = json.loads(file.read_text())
    assert result["untrained"] and result["settings"]["epochs"] == 5

    file = tmp_path / "new" / "result.json"
    assert linear_probe.main(arguments(run, data, "--epochs", "5", "--output", str(file))) == 0
    trained = json.loads(file.read_text())
    assert trained["held_out_accuracy"].keys() == result["held_out_accuracy"].keys()


def test_compare_gives_each_run_and_the_untrained_encoder(run, data, tmp_path):
    file = tmp_path / "compare.json"
    flags = ["--train", data["train"], "--test", data["test"], "--output", str(file)]
    assert compare.main([*flags, str(run)]) == 0
    rows = json.loads(file.read_text())["encoders"]
    assert [row["encoder"] for row in rows] == ["mlo_mae", "untrained"]

    assert knn.main(arguments(run, data)) == knn.main(arguments(run, data, "--untrained")) == 0
    for row, name in zip(rows, ("knn", "knn_untrained"), strict=True):
        alone = json.loads((run / "eval" / f"{name}.json").read_text())
        assert row["knn"]["accuracy"] == alone["accuracy"]


@pytest.fixture
def foreign(run, tmp_path) -> Path:
    """The run's weights as somebody else would hand them on: without a recipe."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    weights = run / "checkpoints" / "step_00000007" / "model.safetensors"
    shutil.copy(weights, folder / "model.safetensors")
    heads = {"num_attention_heads": 4, "decoder_num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(heads))
    return folder


def test_other_peoples_weights_are_evaluated_without_a_recipe(run, foreign, data, tmp_path):
    ours, theirs = of_run(run).model, of_weights([foreign]).model.eval()
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(ours(images), theirs(images))
    pooled = of_weights([foreign], global_pool="avg", image_size=32).model.eval()
    tokens = pooled.forward_features(torch.rand(1, 3, 32, 32))
    assert (tokens.shape, pooled.global_pool) == ((1, 65, 16), "avg")

    file = tmp_path / "knn.json"
    flags = ["--train", data["train"], "--test", data["test"], "--output", str(file)]
    assert knn.main([*flags, "--init_from", str(foreign), "--global_pool", "avg"]) == 0
    result = json.loads(file.read_text())
    assert result["accuracy"] > 0.9 and result["init_from"] == [str(foreign)]
    assert (result["global_pool"], result["image_size"]) == ("avg", [16, 16])
    assert result["mean"] == [0.485, 0.456, 0.406]

    assert compare.main([*flags, str(run), "--init_from", str(foreign)]) == 0
    rows = json.loads(file.read_text())["encoders"]
    assert [row["encoder"] for row in rows] == ["mlo_mae", "mae", "untrained"]
    assert rows[1]["init_from"] == [str(foreign)]
    assert compare.main(flags) == 2
    assert compare.main([*flags, "--init_from", str(foreign)]) == 0
    assert [row["encoder"] for row in json.loads(file.read_text())["encoders"]] == ["mae"]


def test_images_are_normalised_as_the_file_beside_the_weights_says(run, foreign):
    assert of_weights([run]).mean == of_run(run).mean != of_weights([foreign]).mean
    assert of_weights([run]).name == of_run(run).name == "mlo_mae"
    images = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (foreign / "preprocessor_config.json").write_text(json.dumps(images))
    encoder = of_weights([foreign])
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))

    timm = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.4] * 3, "input_size": [3, 16, 16]}}
    (foreign / "config.json").write_text(json.dumps(timm | {"global_pool": "avg"}))
    config = read_config(foreign)
    assert (config["mean"], config["std"], config["global_pool"]) == ((0.5,) * 3, (0.4,) * 3, "avg")


def test_a_run_that_began_with_other_weights_has_an_initial_encoder(run, foreign):
    recipe = run / "checkpoints" / "step_00000007" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("init_from: []", f"init_from: {foreign}"))
    initial = of_run(run, untrained=True)
    assert initial.name == "initial"
    assert torch.equal(initial.model.cls_token, of_run(run).model.cls_token)
    (foreign / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"what {run} was trained from .init_from.: {foreign}"):
        of_run(run, untrained=True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--global_pool", "avg"), ("--image_size", "32"), ("--init_from_expected", "norm*")],
)
def test_flags_for_other_weights_are_refused_for_a_run(run, data, capsys, flag, value):
    assert knn.main(arguments(run, data, flag, value)) == 2
    assert f"{flag} is for --init_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--output is missing"),
        (["--untrained"], "give --checkpoint instead of --init_from"),
        (["--output=x.json", "--init_from=nowhere.pth"], "nowhere.pth"),
        (["--output=x.json", "--image_size=18"], "image_size is 18, which patch_size 4"),
    ],
)
def test_bad_flags_for_other_peoples_weights(foreign, data, capsys, flags, sentence):
    argv = ["--train", data["train"], "--test", data["test"], "--init_from", str(foreign)]
    if any(flag.startswith("--init_from") for flag in flags):
        argv = argv[:-2]
    assert knn.main([*argv, *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"test": "two"}, "has 3 classes, but"),
        ({"test": "renamed"}, "the class 'blue' of"),
        ({"train": "nowhere.beton"}, "nowhere.beton does not exist"),
        ({"checkpoint": "nowhere"}, "nowhere is no folder"),
        ({"output": "/dev/null/x.json"}, "choose another --output"),
    ],
)
def test_bad_input_is_one_sentence(run, data, capsys, changed, sentence):
    flags = {"checkpoint": str(run), "train": data["train"], "test": data["test"]}
    flags |= {flag: data.get(value, value) for flag, value in changed.items()}
    argv = [text for flag, value in flags.items() for text in (f"--{flag}", value)]
    assert knn.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sentence in error
    assert not (run / "eval" / "knn.json").exists()


@pytest.mark.parametrize("flag", ["--k=0", "--temperature=nan", "--num_train_images=-3"])
def test_flags_must_be_positive(run, data, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        knn.main(arguments(run, data, flag))
    assert stopped.value.code == 2
    assert "above zero" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["eval/knn.py"], ["-m", "eval.linear_probe"]])
def test_runs_as_a_script_and_as_a_module(how, data):
    done = subprocess.run(
        [sys.executable, *how, *arguments(Path("nowhere"), data)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.splitlines()[-1].split(":")[0]) == (2, "error"), (
        done.stderr
    )
