"""The folder of an export: its card and measurements, what it may replace, and the command."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mlomae.commands.export.formats as formats
from mlomae.checkpoint.folders import MODEL_FILE, RECIPE_FILE
from mlomae.commands.export.command import export, main
from mlomae.errors import UserError
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from tests.commands.test_export import save_mae_run, save_run

# --- the folder --------------------------------------------------------------------------------


def test_card_recipe_and_measurements_are_those_of_the_checkpoint(tmp_path):
    recipe = save_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    state = {"progress": {"cycle": 4}, "levels": {"pretrain": {"num_steps": 7}}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    records = [{"cycle": cycle, "epoch": cycle / 8} for cycle in (2, 4, 6)]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"cycle": 8, "ep']))
    (tmp_path / "summary.json").write_text(json.dumps({"pretrain_steps": 9}))
    for name in ("knn", "clustering", "cached_probe"):
        (tmp_path / "eval" / name).mkdir(parents=True)
    knn = {"checkpoint": str(checkpoint), "accuracy": 0.4321, "num_test_images": 50}
    (tmp_path / "eval" / "knn" / "result.json").write_text(json.dumps(knn))
    older = knn | {"checkpoint": "elsewhere/step_00000005"}
    (tmp_path / "eval" / "cached_probe" / "result.json").write_text(json.dumps(older))
    clustering = {"checkpoint": str(checkpoint), "nmi": 0.5}
    (tmp_path / "eval" / "clustering" / "result.json").write_text(json.dumps(clustering))

    folder = export(tmp_path, "timm")
    assert load_recipe(folder / RECIPE_FILE, PretrainingRecipe) == recipe
    assert json.loads((folder / "metrics.json").read_text()) == {
        "checkpoint": "step_00000007",
        "last_record": records[1],
        "evaluations": {"clustering": clustering, "knn": knn},
    }
    card = (folder / "README.md").read_text()
    assert "| knn | 43.21 % | 50 |" in card and "_probe" not in card and "| clustering" not in card
    assert "| epochs | 0.5 of 1.2 |" in card
    assert "**Labels were used**" in card and "CC-BY-NC" not in card
    (tmp_path / "summary.json").write_text(json.dumps({"pretrain_steps": 7}))
    folder = export(tmp_path, "timm")
    assert json.loads((folder / "metrics.json").read_text())["summary"] == {"pretrain_steps": 7}


def test_a_run_that_measured_nothing_says_nothing(tmp_path):
    save_run(tmp_path)
    folder = export(tmp_path, "safetensors")
    assert json.loads((folder / "metrics.json").read_text()) == {"checkpoint": "step_00000007"}
    assert "Measured" not in (folder / "README.md").read_text()


def test_the_card_counts_parameters_and_names_where_they_came_from(tmp_path):
    save_mae_run(tmp_path, "init_from=/somewhere/mae_pretrain_vit_base.pth")
    card = (export(tmp_path, "hf") / "README.md").read_text()
    assert "`mae_pretrain_vit_base.pth`" in card and "CC-BY-NC 4.0" in card
    # written out: class token, projection, 2 blocks of 12 D^2 + 13 D, final norm
    encoder = 16 + 49 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert f"{encoder / 1e6:.2f} M parameters" in card


def test_a_checkpoint_can_be_named_and_has_a_folder_of_its_own(tmp_path, monkeypatch):
    for step in (3, 8):
        save_run(tmp_path, step=step)
    older = tmp_path / "checkpoints" / "step_00000003"
    newest = export(tmp_path, "safetensors")
    monkeypatch.chdir(older)
    chosen = export(".", "safetensors")
    assert newest == tmp_path / "export" / "safetensors"
    assert chosen == tmp_path / "export" / "step_00000003" / "safetensors"
    for folder, step in ((newest, 8), (chosen, 3)):
        expected = load_file(tmp_path / "checkpoints" / f"step_{step:08d}" / MODEL_FILE)
        assert torch.equal(load_file(folder / MODEL_FILE)["cls_token"], expected["cls_token"])


def test_an_untouched_export_is_replaced(tmp_path, monkeypatch):
    save_run(tmp_path, step=3)
    folder = tmp_path / "out"
    folder.mkdir()  # empty: as good as none
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        assert export(tmp_path, "hf", ".") == folder
    save_run(tmp_path, step=8)
    export(tmp_path, "safetensors", folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "export.json", "masking.safetensors", "metrics.json", "model.safetensors",
        "recipe.yaml",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]


@pytest.mark.parametrize("name", ["notes.txt", MODEL_FILE, "README.md", "tensors/more.bin"])
def test_what_the_user_added_or_changed_is_not_overwritten(tmp_path, name):
    save_run(tmp_path)
    folder = export(tmp_path, "timm")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(UserError, match=f"^{folder / name} was added or changed after"):
        export(tmp_path, "timm")
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "empty folder inside"])
def test_what_is_no_export_is_not_overwritten(tmp_path, kind):
    save_run(tmp_path)
    output = tmp_path / "mine"
    if kind == "file":
        output.write_text("mine")
    elif kind == "link":
        output.symlink_to(export(tmp_path, "timm"))
    else:
        (output / "sub").mkdir(parents=True)
        if kind == "folder":
            (output / "sub" / "data.txt").write_text("mine")
    with pytest.raises(UserError, match=f"^{output} .*choose another --output"):
        export(tmp_path, "hf", output)
    assert output.is_symlink() == (kind == "link")
    assert not (output / "preprocessor_config.json").exists()


def test_nothing_is_left_of_an_export_that_failed(tmp_path, monkeypatch):
    save_run(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "save_tensors", full)
    output = tmp_path / "out"
    with pytest.raises(UserError, match=f"^{output} cannot be written .*No space left"):
        export(tmp_path, "timm", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_lines_that_load(tmp_path, capsys):
    save_run(tmp_path)
    output = tmp_path / "a folder"
    assert main(str(tmp_path), "hf", str(output)) == 0
    first, _, code = capsys.readouterr().out.partition("\n\n")
    assert first.startswith(f"wrote {output}: ") and "config.json" in first
    loaded = {}
    exec(code, loaded)
    assert type(loaded["autoencoder"]) is transformers.ViTMAEForPreTraining


@pytest.mark.parametrize(
    ("run", "format", "sentence"),
    [("nowhere", "hf", "nowhere is no folder"), (".", "hf", ". holds no complete checkpoint"),
     (".", "tf", "--format tf is not known: use one of timm, hf, safetensors, onnx")],
)  # fmt: skip
def test_the_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, run, format, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(run, format, None) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {sentence}") and printed.err.count("\n") == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []
