"""Nothing that comes from outside is executed: attacks, and a walk through all sources.

The parsers have attacks of their own in `tests/foreign/test_files.py` and
`tests/data_ffcv/sources/test_arrays.py`; these come in by the commands.
"""

import ast
import json
import os
import pickle
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_ffcv import convert as conversion
from data_ffcv.convert import convert
from eval import knn
from mlomae.errors import UserError
from mlomae.pretraining.program import PretrainingProgram
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from mlomae.training import command_line
from tests.ranks import run_ranks
from tests.runs import NUM_CLASSES, NUM_IMAGES, Setup

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlomae", "data_ffcv", "eval", "launch", "benchmarks", "examples")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker), 0o777, True)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that only an attack would make."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("security")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        home = folder / "png" / f"class{number % NUM_CLASSES}"
        home.mkdir(exist_ok=True, parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    convert("imagefolder", folder / "png", folder / "train.beton")
    return Setup(folder, folder / "train.beton")


@pytest.fixture
def weights(tmp_path: Path, marker: Path) -> Path:
    """A weights file with an attack in it."""
    file = tmp_path / "weights.pth"
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 16)}, "args": Attack(marker)}, file)
    return file


# --- attacks -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("marker")
def test_weights_with_code_do_not_start_a_training(
    setup: Setup, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(command_line, "set_up_logging", lambda: None)
    monkeypatch.setattr(command_line, "start_ranks", lambda: pytest.fail("it should be refused"))
    launch = setup.launch("run", f"init_from=[{weights}]", method="mae")
    assert command_line.launch(PretrainingProgram(), **launch) == 2
    assert "weights.pth holds code or objects besides tensors" in capsys.readouterr().err


@pytest.mark.usefixtures("marker")
def test_weights_with_code_are_not_examined(
    setup: Setup, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    beton = str(setup.folder / "train.beton")
    argv = ["--init_from", str(weights), "--train", beton, "--test", beton]
    assert knn.main([*argv, "--output_dir", str(tmp_path / "result")]) == 2
    assert "weights.pth holds code or objects besides tensors" in capsys.readouterr().err


def test_a_cifar_archive_with_code_is_not_converted(
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    names = [f"class{number}".encode() for number in range(10)]
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    for number in range(1, 6):
        batch = {b"data": Attack(marker), b"labels": [0]}
        (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps(batch))
    out = tmp_path / "out.beton"
    monkeypatch.setattr("sys.argv", ["convert", "cifar10", str(tmp_path), str(out)])
    assert conversion.main() == 2
    assert re.search(r"data_batch_1 is not a CIFAR file \(.*makedirs", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir"])
def test_a_recipe_with_code_is_refused(tmp_path: Path, marker: Path, tag: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: mae\noutput_dir: !!python/{tag} [{marker}]\n")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(str(file), PretrainingRecipe)


@pytest.mark.usefixtures("marker")
def test_an_override_with_code_is_refused(setup: Setup, tmp_path: Path):
    override = f"output_dir=!!python/object/apply:os.mkdir [{tmp_path / 'marker'}]"
    with pytest.raises(UserError, match="output_dir"):
        load_recipe(setup.recipes["mae"], PretrainingRecipe, (override,))


def _plant(checkpoint: Path, marker: Path) -> None:
    """Attacks under all names that a checkpoint had or has, with sums to match.

    The files of ZeRO and `random_*.pt` are those of the first format, which held pickles.
    """
    attack = pickle.dumps(Attack(marker))
    old = checkpoint / "pretrain" / "engine"
    old.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(Attack(marker), old / name)
    torch.save(Attack(marker), checkpoint / "random_00000.pt")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["crc32"]
    for name in state["files"]:
        if name.startswith("random_"):
            (checkpoint / name).write_bytes(attack)
            state["files"][name] = {"bytes": len(attack), "crc32": zlib.crc32(attack)}
    state["crc32"] = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    (checkpoint / "state.json").write_text(json.dumps(state))


def run_and_resume_planted(launch: dict[str, Any], checkpoints: Path, marker: Path) -> Any:
    """A run, and its resumption after an attack was planted; for one rank."""
    from tests.runs import drive

    first = drive([launch])
    assert first[0][0] == 0, first
    os.remove(checkpoints.parent / "summary.json")
    _plant(max(checkpoints.glob("step_*")), marker)
    return [*first, *drive([launch | {"resume": True}])]


@pytest.mark.slow
def test_a_checkpoint_with_code_is_refused(setup: Setup, marker: Path, tmp_path: Path):
    launch = setup.launch("attacked", "epochs=0.6", method="mae")
    checkpoints = setup.folder / "attacked" / "checkpoints"
    arguments = {"launch": launch, "checkpoints": checkpoints, "marker": marker}
    where = "tests.test_security:run_and_resume_planted"
    (((first, _), (second, error)),) = run_ranks(where, 1, tmp_path / "ranks", **arguments)
    assert (first, second) == (0, 2), error
    assert re.search(r"step_\d+ cannot be read \(.*header", error), error


# --- the sources -------------------------------------------------------------------------------

UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}
# file: why it may import pickle
PICKLES = {
    "data_ffcv/sources/cifar.py": "reads arrays with an unpickler that finds no other class",
    "benchmarks/_pictures.py": "writes an archive as CIFAR's",
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
FORBIDDEN = SHELLS | {
    *("eval", "exec", "compile", "pickle.load", "pickle.loads", "tempfile.mktemp"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
}


def findings(source: str, file: str = "") -> list[str]:
    """What a source calls or imports that could execute what comes from outside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {module} if module else {alias.name for alias in node.names}
            forbidden = UNPICKLING if file in PICKLES else UNPICKLING | {"pickle"}
            found += sorted({str(name).split(".")[0] for name in names} & forbidden)
        elif isinstance(node, ast.Call):
            found += _about_call(ast.unparse(node.func), node)
    return found


def _about_call(name: str, call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    method = name.split(".")[-1]
    if method == "load_checkpoint":
        yield "DeepSpeed's checkpoints, which are pickles"
    if name in FORBIDDEN:
        yield name
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "yaml.load" and not given.get("Loader", "").endswith(("SafeLoader", "_Loader")):
        yield "yaml.load without a safe loader"
    if method in ("extract", "extractall") and given.get("filter") != "'data'":
        yield f"{method} without filter='data'"
    for argument in ("allow_pickle", "shell", "trust_remote_code"):
        if given.get(argument, "False") != "False":
            yield f"{name} with {argument}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_executes_what_comes_from_outside(package: str):
    files = [*ROOT.glob(f"{package}/**/*.py")]
    files = [file for file in files if not _is_hidden(file)]
    assert files
    found = {}
    for file in files:
        name = str(file.relative_to(ROOT))
        if finding := findings(file.read_text(), name):
            found[name] = finding
    assert not found


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(ROOT).parts)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "import pickle",
        "from pickle import load",
        "import joblib",
        "engine.load_checkpoint(folder)",
        "pickle.loads(text)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "archive.extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_walk_sees_what_is_forbidden(source: str):
    assert len(findings(source)) == 1


def test_the_loader_of_recipes_is_a_safe_one():
    text = (ROOT / "mlomae/recipe/yaml_text.py").read_text()
    assert "class _Loader(yaml.SafeLoader)" in text


# --- TensorBoard -------------------------------------------------------------------------------


def _texts() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for package in (*PACKAGES, "docs", "ds_configs"):
        for suffix in ("md", "py", "sh", "yaml"):
            found = ROOT.glob(f"{package}/**/*.{suffix}")
            yield from (file for file in found if not _is_hidden(file))


def test_every_tensorboard_command_is_bound_to_localhost():
    """Those of texts, and those that code prints, over the end of a line too."""
    commands = {}
    for file in _texts():
        text = file.read_text()
        for match in re.finditer(r"tensorboard\s+--", text):
            where = f"{file.relative_to(ROOT)}:{match.start()}"
            commands[where] = text[match.start() : match.start() + 120]
    assert commands
    wrong = [where for where, command in commands.items() if "--host localhost" not in command]
    assert not wrong and "--bind_all" not in "".join(commands.values())
