"""Weights files in every wrapping; broken ones are refused by one sentence, and run no code."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mlomae.errors import UserError
from mlomae.foreign.files import find_file, read_config, read_tensors

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(tensors: dict, expected: dict = STATE) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], expected[name]) for name in expected
    )


# --- wrappings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pretrain.pth", {"model": STATE}),
        (
            "checkpoint-20.pth",
            {
                "model": STATE,
                "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []},
                "epoch": 20,
                "scaler": {"scale": 1.0},
                "args": Namespace(blr=1e-3, data_path="/data", distributed=False),
            },
        ),
        ("encoder.th", {"state_dict": STATE, "ctor_kwargs": {"depth": 2, "kind": "vit"}}),
        ("encoder ema=0.9999 model.th", STATE),
        ("parallel.pt", {f"module.{name}": tensor for name, tensor in STATE.items()}),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappings_are_taken_off(name, content, zipped, tmp_path):
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(read_tensors(tmp_path / name))


def test_a_safetensors_file(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(read_tensors(str(tmp_path / "w.safetensors")))


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_means_its_weights(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert same(read_tensors(tmp_path))
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert find_file(tmp_path) == tmp_path / "model.safetensors"


def test_a_sharded_folder_is_read_whole(tmp_path):
    where = {}
    for number, name in enumerate(STATE):
        where[name] = f"model-{number}.safetensors"
        save_file({name: STATE[name]}, tmp_path / where[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(read_tensors(tmp_path))
    (tmp_path / where["a.bias"]).unlink()
    with pytest.raises(UserError, match=r"index\.json names model-1\.safetensors, which is not"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "where", [{"a": ""}, {"a": "model.safetensors.index.json"}, {"a": [3]}, []]
)
def test_an_index_that_names_no_file(where, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=r"index\.json names .*, which is not there: copy"):
        read_tensors(tmp_path)


def test_the_last_state_of_accelerate(tmp_path):
    for number in (9, 10):
        folder = tmp_path / f"checkpoint_{number}"
        folder.mkdir()
        save_file({"number": torch.tensor(float(number))}, folder / "model.safetensors")
    assert read_tensors(tmp_path)["number"] == 10
    assert read_tensors(tmp_path / "checkpoint_9")["number"] == 9


def test_a_run_means_its_last_complete_checkpoint(tmp_path):
    for name in ("step_00000001", "step_00000002", "step_00000003.tmp"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        save_file(STATE, folder / "model.safetensors")
    assert find_file(tmp_path).parent.name == "step_00000002"


# --- what lies beside the weights --------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"image_size": 32, "num_attention_heads": 2, "decoder_num_attention_heads": 4},
            {"image_size": 32, "num_heads": 2, "decoder_num_heads": 4},
        ),
        ({"pretrained_cfg": {"input_size": [3, 32, 64]}}, {"image_size": [32, 64]}),
        ({"architecture": "resnet"}, {}),
        ({"image_size": "large", "num_attention_heads": None, "pretrained_cfg": 3}, {}),
    ],
)
def test_what_a_config_tells(config, expected, tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_config(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == expected


def test_a_broken_config_is_refused(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON .*: download or copy it again"):
        read_config(tmp_path)


# --- code is refused ---------------------------------------------------------------------------


class WritesMarker:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["beside", "inside_namespace", "as_tensor"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(where, zipped, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "w.pth"
    code = WritesMarker(marker)
    content = {
        "beside": {"model": STATE, "epoch": code},
        "inside_namespace": {"model": STATE, "args": Namespace(a=code)},
        "as_tensor": {"a.weight": code},
    }[where]
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth holds code .*mkdir.* was not run: ask its author"):
        read_tensors(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the file is one that would have done it
    assert marker.exists()


def test_a_plain_pickle_is_not_run(tmp_path):
    file = tmp_path / "w.pkl"
    file.write_bytes(pickle.dumps({"model": WritesMarker(tmp_path / "marker")}))
    with pytest.raises(UserError, match=r"w\.pkl is cut short, no weights file, or a pickle"):
        read_tensors(file)
    assert not (tmp_path / "marker").exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_tensors(tmp_path / "w.pth")


# --- broken files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short(kind, tmp_path):
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    state = {"a": torch.zeros(1000)}
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    assert read_tensors(file)["a"].shape == (1000,)
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"w\.\w+ is cut short, no weights file, or .*copy it"):
            read_tensors(file)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kind", ["text", "picture"])
def test_what_is_no_weights_file(name, kind, tmp_path):
    file = tmp_path / name
    if kind == "text":
        file.write_text("hello\nworld\n")
    else:
        Image.new("RGB", (9, 9)).save(file, format="jpeg")
    with pytest.raises(UserError, match=r"w\.\w+ is cut short, no weights file, or .*give a \.pth"):
        read_tensors(file)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_an_empty_file(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"w\.\w+ is empty: download or copy it again"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
        {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []},
        {"model": {}},
        [torch.ones(1)],
        torch.ones(1),
    ],
)
def test_a_file_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds no weights.*: give the file"):
        read_tensors(tmp_path / "w.pth")


def test_a_path_with_nothing(tmp_path):
    with pytest.raises(UserError, match="missing does not exist: give a weights file"):
        read_tensors(tmp_path / "missing")
    with pytest.raises(UserError, match=r"holds no weights .*: give a weights file"):
        read_tensors(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint: train first"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "quick_gelu"), ("qkv_bias", False)])
def test_an_encoder_that_computes_otherwise_is_refused(tmp_path, key, value):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({key: value, "num_attention_heads": 2}))
    with pytest.raises(UserError, match=f"config.json has {key} {value}, but the encoder here"):
        read_config(tmp_path)


def test_a_folder_around_runs_names_them(tmp_path):
    (tmp_path / "tune" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"no complete checkpoint: give {tmp_path}/tune"):
        find_file(tmp_path)
