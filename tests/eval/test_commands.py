"""The commands on a small untrained run and small image files."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval import cached_probe, compare, knn
from eval.frozen.encoders import of_run, of_weights
from mlomae.errors import UserError
from mlomae.foreign.files import read_config

ROOT = Path(__file__).parents[2]


def arguments(run: Path, data: dict[str, str], *more: str) -> list[str]:
    return ["--checkpoint", str(run), "--train", data["train"], "--test", data["test"], *more]


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_knn_command_leaves_a_result_a_report_and_curves(run, data, capsys):
    assert knn.main(arguments(run, data, "--k", "3", "--num_train_images", "30")) == 0
    folder = run / "eval" / "knn"
    result = read(folder)
    assert result["accuracy"] > 0.9
    assert (result["settings"]["k"], result["settings"]["temperature"]) == (3, 0.07)
    assert (result["num_train_images"], result["num_test_images"]) == (30, 15)
    assert result["checkpoint"] == str(run / "checkpoints" / "step_00000007")
    assert result["seconds"] > 0
    assert f"{100 * result['accuracy']:.2f} %" in capsys.readouterr().out

    report = (folder / "report.md").read_text()
    assert f"| accuracy | {100 * result['accuracy']:.2f} % |" in report
    assert "cosine" in report and "| k | 3 |" in report and "torch " in report
    assert f"python eval/knn.py --checkpoint {run}" in report
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "eval/knn/accuracy": result["accuracy"]}
    curves = EventAccumulator(str(folder)).Reload()
    (scalar,) = curves.Scalars("eval/knn/accuracy")
    assert (scalar.step, scalar.value) == (7, pytest.approx(result["accuracy"]))


def test_cached_probe_command_takes_a_checkpoint_folder_and_untrained(run, data, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000007"
    assert cached_probe.main(arguments(checkpoint, data, "--untrained", "--epochs", "5")) == 0
    folder = run / "eval" / "step_00000007" / "cached_probe_untrained"
    result = read(folder)
    assert result["untrained"] and result["settings"]["epochs"] == 5
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 0

    folder = tmp_path / "new" / "result"
    flags = ["--epochs", "5", "--output_dir", str(folder)]
    assert cached_probe.main(arguments(run, data, *flags)) == 0
    assert read(folder)["held_out_accuracy"].keys() == result["held_out_accuracy"].keys()


def test_compare_gives_each_run_and_the_untrained_encoder(run, data, tmp_path):
    file = tmp_path / "compare.json"
    flags = ["--train", data["train"], "--test", data["test"], "--output", str(file)]
    assert compare.main([*flags, str(run)]) == 0
    rows = json.loads(file.read_text())["encoders"]
    assert [row["encoder"] for row in rows] == ["mlo_mae", "untrained"]

    assert knn.main(arguments(run, data)) == knn.main(arguments(run, data, "--untrained")) == 0
    for row, name in zip(rows, ("knn", "knn_untrained"), strict=True):
        alone = read(run / "eval" / name)
        assert row["knn"]["accuracy"] == alone["accuracy"]


def test_other_peoples_weights_are_evaluated_without_a_recipe(run, foreign, data, tmp_path):
    ours, theirs = of_run(run).model, of_weights([foreign]).model.eval()
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(ours(images), theirs(images))
    pooled = of_weights([foreign], global_pool="avg", image_size=32).model.eval()
    tokens = pooled.forward_features(torch.rand(1, 3, 32, 32))
    assert (tokens.shape, pooled.global_pool) == ((1, 65, 16), "avg")

    images = ["--train", data["train"], "--test", data["test"]]
    pooled = ["--init_from", str(foreign), "--global_pool", "avg", "--output_dir", str(tmp_path)]
    assert knn.main([*images, *pooled]) == 0
    result = read(tmp_path)
    assert result["accuracy"] > 0.9 and result["init_from"] == [str(foreign)]
    assert (result["global_pool"], result["image_size"]) == ("avg", [16, 16])
    assert result["mean"] == [0.485, 0.456, 0.406]

    file = tmp_path / "compare.json"
    flags = [*images, "--output", str(file)]
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
        ([], "--output_dir is missing"),
        (["--untrained"], "give --checkpoint instead of --init_from"),
        (["--output_dir=x", "--init_from=nowhere.pth"], "nowhere.pth"),
        (["--output_dir=x", "--image_size=18"], "image_size is 18, which patch_size 4"),
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
        ({"output_dir": "/dev/null/x"}, "choose another with --output_dir"),
        ({"features": "/dev/null/x"}, "choose another with --features"),
        ({"k": "61"}, "k is 61, but must be from 1 to the 60 training images"),
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
    assert not list(run.rglob("result.json"))


@pytest.mark.parametrize("flag", ["--k=0", "--temperature=nan", "--num_train_images=-3"])
def test_flags_must_be_positive(run, data, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        knn.main(arguments(run, data, flag))
    assert stopped.value.code == 2
    assert "above zero" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["eval/knn.py"], ["-m", "eval.cached_probe"]])
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


# --- recipes of flags ---------------------------------------------------------------------------


def test_flags_win_over_a_recipe_and_a_recipe_over_defaults(run, data, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"k: 5\ntemperature: 0.5\nstandardize: true\ntrain: {data['train']}\n"
        f"test: {data['test']}\ncheckpoint: {run}\n"
    )
    assert knn.main(["--recipe", str(recipe), "--k", "2"]) == 0
    assert read(run / "eval" / "knn")["settings"] == {
        "k": 2, "temperature": 0.5, "weighting": "exponential", "standardize": True,
    }  # fmt: skip
    assert knn.main(["--recipe", str(recipe), "--no-standardize"]) == 0
    assert not read(run / "eval" / "knn")["settings"]["standardize"]
    recipe.write_text("base_lrs: [0.1, 0.3]\nepochs: 2\n")
    assert cached_probe.main(arguments(run, data, f"--recipe={recipe}")) == 0
    assert read(run / "eval" / "cached_probe")["settings"]["base_lrs"] == [0.1, 0.3]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("temprature: 0.1", "temprature is no flag of eval/knn.py: temperature is the nearest"),
        ("k: 0", "k: 0 is not a whole number above zero"),
        ("standardize: maybe", "standardize is maybe: write true or false"),
        ("weighting: cubic", "weighting is cubic: choose exponential or uniform"),
        ("k: 1\nk: 2", "the key k stands twice"),
        (None, "mine.yaml is no file: give a YAML file or a shipped name"),
    ],
)
def test_a_bad_recipe_is_one_sentence(run, data, tmp_path, capsys, text, sentence):
    recipe = tmp_path / "mine.yaml"
    if text is not None:
        recipe.write_text(text)
    assert knn.main(arguments(run, data, "--recipe", str(recipe))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(recipe) in error and sentence in error


SHIPPED = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
COMMANDS = ("knn", "low_shot", "clustering", "cached_probe", "reconstruct")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_shipped_recipe_of_a_command_is_read_by_it(command, data, capsys):
    recipes = [file.stem for file in SHIPPED if file.stem.startswith(f"{command}_")]
    assert recipes
    module = importlib.import_module(f"eval.{command}")
    for recipe in recipes:
        flags = ["--recipe", recipe, "--checkpoint", "nowhere", "--test", data["test"]]
        learns = command in ("knn", "low_shot", "cached_probe")
        assert module.main([*flags, *(["--train", data["train"]] if learns else [])]) == 2
        assert f"{recipe}.yaml" not in capsys.readouterr().err  # the data or the run is at fault


def test_a_run_of_another_kind_is_read_by_its_weights(run, data):
    """Such as a fine-tuned encoder: no decoder, and a recipe of its own."""
    checkpoint = run / "checkpoints" / "step_00000007"
    before = of_run(run)
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: mlo_mae", "method: finetune"))
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(("decoder", "mask_token"))}
    save_file(kept, checkpoint / "model.safetensors")
    encoder = of_run(run)
    assert (encoder.name, encoder.mean) == ("finetune", before.mean)
    assert encoder.fingerprint == before.fingerprint
    assert knn.main(arguments(run, data)) == 0
    assert read(run / "eval" / "knn")["checkpoint"] == str(checkpoint)
    with pytest.raises(UserError, match="is a run of finetune"):
        of_run(run, untrained=True)


def test_a_training_runs_own_files_are_not_replaced(run, data, capsys):
    (run / "report.md").write_text("of the training")
    assert knn.main(arguments(run, data, "--output_dir", str(run))) == 2
    assert "holds a training run" in capsys.readouterr().err
    assert (run / "report.md").read_text() == "of the training"


def test_a_comparison_is_one_file_and_may_lie_beside_a_run(run, data):
    (run / "recipe.yaml").write_text("of the training")
    file = run / "compare.json"
    flags = ["--train", data["train"], "--test", data["test"], "--output", str(file)]
    assert compare.main([*flags, str(run)]) == 0 and file.is_file()


def test_the_folder_around_runs_names_them(run, data, capsys):
    assert knn.main(arguments(run.parent, data)) == 2
    assert f"holds no complete checkpoint: give {run}" in capsys.readouterr().err


def test_an_encoder_computes_in_the_precision_asked_for(run, data):
    assert knn.main(arguments(run, data, "--precision", "bf16")) == 0
    result = json.loads((run / "eval" / "knn" / "result.json").read_text())
    assert result["precision"] == "bf16" and result["accuracy"] > 0.9
