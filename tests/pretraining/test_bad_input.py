"""Bad input ends in one sentence and exit code 2, before training, and overwrites nothing."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_ffcv.convert import convert
from mlomae.pretraining.program import PretrainingProgram
from mlomae.training import command_line
from tests.ranks import run_ranks
from tests.runs import Setup, mounted_tmpfs, tree

LAST = "checkpoints/step_00000008"


@pytest.fixture
def refused(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Launch what must be refused, and return the sentence."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(command_line, "set_up_logging", lambda: None)

    def no_training(*_: Any) -> None:
        pytest.fail("this launch should have been refused")

    monkeypatch.setattr(command_line, "start_ranks", no_training)

    def launch(*overrides: str, run: str = "run", **more: Any) -> str:
        arguments = setup.launch(run, *overrides, **more)
        before = tree(setup.folder)
        assert command_line.launch(PretrainingProgram(), **arguments) == 2
        assert tree(setup.folder) == before
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return launch


# --- the recipe and the DeepSpeed config ---------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.image_size=9", ["model.image_size", "9", "patch_size 2", "use 8 or 10"]),
        ("model.patchsize=2", ["model.patchsize", "model.patch_size"]),
        ("pretrain.lrate=1", ["pretrain.lrate", "pretrain.lr"]),
        ("model.preset=vit_bsae", ["vit_bsae", "vit_base"]),
        ("data.num_classes=7", ["data.num_classes is 7", "4 classes", "data.num_classes=4"]),
        ("pretrain.batch_size=96", ["pretrain.batch_size is 96", "64 images"]),
        ("mask.batch_size=32", ["mask.batch_size is 32", "16 images"]),
        ("epochs", ["epochs", "key.subkey=value"]),
    ],
)
def test_recipe_that_cannot_be_trained(
    refused: Callable[..., str], override: str, named: list[str]
) -> None:
    error = refused(override)
    assert [text for text in named if text not in error] == [], error


def test_recipe_which_does_not_exist(refused: Callable[..., str]) -> None:
    assert "nearest" in (error := refused(recipe="quickstart_mlomae"))
    assert "quickstart_mlomae" in error and "quickstart_mlo_mae" in error


def test_batch_which_the_ranks_cannot_share(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    error = refused()
    assert "pretrain.batch_size is 16" in error and "3 ranks" in error and "use 18" in error


@pytest.mark.parametrize(
    ("extra", "values"),
    [
        ({"train_batch_size": 64}, ("train_batch_size is 64", "16")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, ("lr is 0.5", "0.001")),
        ({"gradient_clipping": 2.0}, ("gradient_clipping is 2.0", "0.5")),
    ],
)
def test_deepspeed_config_that_contradicts_the_recipe(
    refused: Callable[..., str], setup: Setup, extra: dict[str, Any], values: tuple[str, str]
) -> None:
    config = setup.config(**extra)
    error = refused(deepspeed_config=config)
    assert config in error and setup.recipe in error
    assert all(value in error for value in values), error


def test_deepspeed_config_which_does_not_exist(refused: Callable[..., str]) -> None:
    assert "nowhere.json" in refused(deepspeed_config="nowhere.json")


# --- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        (lambda content: None, "does not exist"),
        (lambda content: b"", "empty"),
        (lambda content: content[:-100], "truncated"),
        (lambda content: content[:2000], "truncated"),
        (lambda content: b"PK\3\4" + content[4:], "is not a .beton file"),
    ],
    ids=["missing", "empty", "tail cut off", "head alone", "another kind"],
)
def test_beton_that_cannot_be_read(
    refused: Callable[..., str],
    setup: Setup,
    beton: Path,
    cut: Callable[[bytes], bytes | None],
    named: str,
) -> None:
    path = setup.folder / "bad.beton"
    content = cut(beton.read_bytes())
    if content is not None:
        path.write_bytes(content)
    error = refused(f"data.train={path}")
    assert str(path) in error and named in error and "data_ffcv.convert" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=nowhere"], ["nowhere", "does not exist"]),
        (["data.augmentation.auto_augment=rand-x9"], ["auto_augment", "rand-x9"]),
        (["data.augmentation.kind=pad_crop", "data.augmentation.padding=0",
          "model.image_size=16"], ["10 pixels", "raise padding"]),
        (["data.augmentation.color_jitter=[0.4, 0.4, 0.2, 0.9]"], ["color_jitter"]),
    ],
)  # fmt: skip
def test_bad_data_settings_are_refused(
    refused: Callable[..., str], overrides: list[str], words: list[str]
) -> None:
    error = refused(*overrides)
    assert all(word in error for word in words)


def test_a_file_with_masks_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    for name, mode in (("images", "RGB"), ("annotations", "L")):
        (tmp_path / "scenes" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.zeros((10, 10, 3) if mode == "RGB" else (10, 10), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scenes" / name / f"{number}.png")
    path = tmp_path / "scenes.beton"
    convert("segmentation", tmp_path / "scenes", path)
    assert "holds masks" in refused(f"data.train={path}")


# --- the output folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("leftover", ["recipe.yaml", "checkpoints/step_00000002/state.json"])
def test_output_dir_which_holds_another_run(
    refused: Callable[..., str], setup: Setup, leftover: str
) -> None:
    file = setup.folder / "run" / leftover
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    error = refused()
    assert str(setup.folder / "run") in error and "--resume" in error


@pytest.mark.parametrize("place", ["mlo_mae.yaml/run", "/proc/run", "/proc/1/run"])
def test_output_dir_which_cannot_be_made(
    refused: Callable[..., str], setup: Setup, place: str
) -> None:
    folder = setup.folder / place
    error = refused(f"output_dir={folder}")
    assert str(folder) in error and "cannot be written" in error


def test_output_dir_on_a_disk_that_is_nearly_full(
    refused: Callable[..., str], setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**5, 10**5))
    error = refused()
    assert str(setup.folder / "run") in error and "GiB free" in error


def test_output_dir_on_a_disk_of_one_mebibyte(
    refused: Callable[..., str], setup: Setup, tmp_path: Path
) -> None:
    disk = tmp_path / "small"
    with mounted_tmpfs(disk, 2**20) as problem:
        if problem:
            pytest.skip(f"no small disk here: {problem}")
        assert "GiB free" in refused("model.depth=64", f"output_dir={disk / 'run'}")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free))
        error = refused(f"output_dir={disk / 'other'}")
        assert "cannot be written (No space left on device)" in error


# --- resuming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(module_setup: Setup) -> tuple[Path, list[tuple[int, str]]]:
    """A finished run of one rank, and what became of one whose files only a reader finds wrong."""
    optimizer = f"damaged/{LAST}/mask/shards_00000.safetensors"
    launches = [
        module_setup.launch("run"),
        module_setup.launch(
            "damaged",
            resume=True,
            # as many bytes as before, so that only reading them shows the damage
            shell=f"cd {module_setup.folder}; cp -r run damaged; rm damaged/summary.json; "
            f"shred -n 1 -x {optimizer}",
        ),
    ]
    (outcomes,) = run_ranks("tests.runs:drive", 1, module_setup.folder / "ranks", launches=launches)
    assert outcomes[0][0] == 0
    return module_setup.folder / "run", outcomes


def test_resuming_from_other_bytes(finished: Any) -> None:
    _, (_, (code, stderr)) = finished
    assert code == 2 and "Traceback" not in stderr
    error = stderr.splitlines()[-1]
    assert error.startswith("error: no checkpoint in ")
    assert "mask/shards_00000.safetensors: its bytes are not those that were written" in error


@pytest.fixture
def copied(finished: Any, setup: Setup) -> Path:
    """A copy of the finished run, to be broken."""
    return Path(shutil.copytree(finished[0], setup.folder / "run"))


def test_resuming_with_a_changed_recipe(refused: Callable[..., str], copied: Path) -> None:
    error = refused("pretrain.lr=2e-3", "model.depth=2", resume=True)
    assert str(copied / LAST) in error and "pretrain.lr" in error and "model.depth" in error


def test_resuming_from_a_checkpoint_of_another_model(
    refused: Callable[..., str], copied: Path, setup: Setup
) -> None:
    """The checkpoints of another run were copied into this one's folder."""
    (copied / "checkpoints").rename(setup.folder / "theirs")
    shutil.copytree(setup.folder / "theirs", copied / "checkpoints")
    error = refused("model.embed_dim=32", "model.num_heads=4", resume=True)
    assert "model.embed_dim" in error and "model.num_heads" in error


def test_resuming_a_run_that_ended_before_its_first_checkpoint(
    refused: Callable[..., str], copied: Path
) -> None:
    shutil.rmtree(copied / "checkpoints")
    assert "--resume" in refused()
    assert "mask.lr" in refused("mask.lr=0.5", resume=True)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", lambda file: file.write_text("garbage")),
        ("state.json", lambda file: file.write_text("[]")),
        ("state.json", lambda file: file.write_text('{"format": 2}')),
        ("state.json", lambda file: file.write_text(file.read_text().replace("cycle", "cicle"))),
        ("state.json", lambda file: file.unlink()),
        ("pretrain/shards_00000.safetensors", _truncate),
        ("mask/shards_00000.safetensors", lambda file: file.write_bytes(b"")),
        ("random_00000.safetensors", lambda file: file.unlink()),
        ("recipe.yaml", lambda file: file.unlink()),
        ("model.safetensors", _truncate),
    ],
)
def test_resuming_from_nothing_but_a_damaged_checkpoint(
    refused: Callable[..., str], copied: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    damage(copied / LAST / name)
    error = refused(resume=True)
    assert f"no checkpoint in {copied / 'checkpoints'} can be read ({Path(LAST).name}: " in error
    assert f"{name}: " in error and "bring one back" in error


def test_resuming_what_a_newer_version_wrote(refused: Callable[..., str], copied: Path) -> None:
    file = copied / LAST / "state.json"
    state = json.loads(file.read_text())
    state |= {"format": 99, "versions": {"mlomae": "9.9"}}
    file.write_text(json.dumps(state))
    assert "has format 99" in (error := refused(resume=True)) and "mlomae 9.9" in error


# --- a rank on its own ---------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds slept."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    yield found


def test_a_rank_that_fails_alone_is_heard(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    error = refused("data.train=not_on_this_node.beton")
    assert error.startswith("error: rank 11: not_on_this_node.beton does not exist")
    assert sum(naps) > 2  # what the launcher, polling each second, needs to end ranks like others
