"""The rules of the layout: who may import whom, and what is installed."""

import ast
import runpy
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# folder or module -> what it may import besides itself; every folder of the project stands here
BASICS = {"mlomae", "mlomae.errors", "mlomae.randomness", "mlomae.environment"}
CORE = {*BASICS, "mlomae.hypergrad", "mlomae.models", "mlomae.distributed"}
STATE = {*CORE, "mlomae.recipe", "mlomae.checkpoint"}
TRAINING = {*STATE, "mlomae.foreign", "mlomae.training", "data_ffcv"}
PROGRAMS = {*TRAINING, "mlomae.pretraining", "mlomae.contrastive"}
DATA = {"data_ffcv.errors", "data_ffcv.splits", "data_ffcv.beton", "data_ffcv.sources"}
EVAL = {*TRAINING, "mlomae.pretraining", "data_ffcv.sources", "data_ffcv.splits", "eval.frozen"}
ARROWS: dict[str, set[str]] = {
    "data_ffcv.errors": set(),
    "data_ffcv.splits": {"data_ffcv.errors"},
    "data_ffcv.beton": {"data_ffcv.errors"},
    "data_ffcv.sources": {"data_ffcv.errors", "data_ffcv.splits", "data_ffcv.beton"},
    "data_ffcv.pixels": DATA,
    "data_ffcv.streams": {*DATA, "data_ffcv.pixels"},
    "data_ffcv.conversion": DATA,
    "data_ffcv": {*DATA, "data_ffcv.pixels", "data_ffcv.streams"},
    "data_ffcv.convert": {*DATA, "data_ffcv.conversion"},
    "data_ffcv.inspect": DATA,
    "mlomae.errors": set(),
    "mlomae.randomness": set(),
    "mlomae.environment": {"mlomae"},
    "mlomae.hypergrad": set(),
    "mlomae.distributed": {"mlomae.errors"},
    "mlomae.models": {"mlomae.errors", "mlomae.distributed"},
    "mlomae.recipe": {*CORE, "data_ffcv"},
    "mlomae.checkpoint": {*CORE, "mlomae.recipe"},
    "mlomae.foreign": STATE,
    "mlomae.training": TRAINING,
    "mlomae.pretraining": TRAINING,
    "mlomae.contrastive": {*TRAINING, "mlomae.pretraining"},
    "mlomae.commands": {*PROGRAMS, "data_ffcv.convert"},
    "mlomae.commands.export": PROGRAMS,
    "mlomae.commands.gradcheck": {*PROGRAMS, "mlomae.commands"},
    "mlomae.commands.plan": {*PROGRAMS, "mlomae.commands"},
    "mlomae.commands.preflight": PROGRAMS,
    "mlomae.commands.quickstart": {*PROGRAMS, "data_ffcv.convert"},
    "mlomae.commands.show_masks": PROGRAMS,
    "mlomae": {"data_ffcv.sources"},  # what timm's import of torchvision needs
    "mlomae.__main__": set(),  # finds a command by its name
    "eval.frozen": EVAL,
    "eval.finetuning": EVAL,
    "eval.probing": EVAL,
    "eval.segmentation": {*EVAL, "data_ffcv.inspect"},
    "eval": {*EVAL, "eval.finetuning", "eval.probing", "eval.segmentation"},
    "launch": {*PROGRAMS},
}
# folder -> third-party packages that would give away that it knows too much
STRANGERS = {
    "mlomae.hypergrad": {"timm", "torchvision", "ffcv", "PIL"},
    "mlomae.models": {"deepspeed", "ffcv"},
    "data_ffcv": {"deepspeed"},
}


def home_of(module: str) -> str:
    """The innermost entry of `ARROWS` that holds a module; the module itself without one."""
    homes = [home for home in ARROWS if f"{module}.".startswith(f"{home}.")]
    return max(homes, key=len, default=module)


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the project, by its dotted name."""
    tops = sorted({home.split(".")[0] for home in ARROWS})
    files = [path for top in tops for path in sorted((root / top).rglob("*.py"))]
    parts = [path.relative_to(root).with_suffix("").parts for path in files]
    names = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    return dict(zip(names, files, strict=True))


def imported_names(path: Path, root: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports: inside functions, for types, too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def module_of(name: str, modules: Collection[str]) -> str | None:
    """The module that a dotted name is, or is in; None for somebody else's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def wrong_imports(root: Path) -> list[str]:
    """Return "module imports name" for every arrow that points up, out or at something private."""
    modules, wrong = modules_of(root), []
    for module, path in modules.items():
        home = home_of(module)
        for name in imported_names(path, root):
            target, top = home_of(name), name.split(".")[0]
            is_ours = top in {*(entry.split(".")[0] for entry in ARROWS), "tests"}
            is_up = is_ours and target not in {home, *ARROWS.get(home, set())}
            is_strange = any(
                top in STRANGERS[s] for s in STRANGERS if f"{home}.".startswith(f"{s}.")
            )
            is_private = is_ours and target != home and "._" in name.replace("__", "")
            if is_up or is_strange or is_private:
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(root: Path) -> list[str]:
    """Return "a > b > a" for a circle of imports; empty where there is none."""
    modules = modules_of(root)
    graph = {
        module: {module_of(name, modules) for name in imported_names(path, root)} - {None, module}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" > ".join(error.args[1])]
    return []


def test_imports_point_down_and_at_public_names():
    assert wrong_imports(ROOT) == []


def test_no_import_goes_in_a_circle():
    assert cycles(ROOT) == []


def test_every_folder_has_its_line():
    folders = {
        ".".join(path.relative_to(ROOT).parts)
        for top in ("mlomae", "eval", "data_ffcv")
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert folders <= set(ARROWS)
    assert all(module_of(home, modules_of(ROOT)) == home for home in ARROWS if home != "launch")


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "launch", "tests"])
def test_what_scripts_import_exists(folder):
    """The type checker looks at the packages alone, and a benchmark is not started by a test."""
    modules, missing = modules_of(ROOT), []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported_names(path, ROOT):
            module = module_of(name, modules)
            attribute = name.removeprefix(f"{module}.") if module else ""
            if module and attribute != name and not hasattr(import_module(module), attribute):
                missing.append(f"{path.relative_to(ROOT)} imports {name}")
    assert missing == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("mlomae/hypergrad/level.py", "import mlomae.errors"),
        ("mlomae/hypergrad/level.py", "from ..models import mae"),
        ("mlomae/hypergrad/level.py", "from .. import errors"),
        ("mlomae/models/mae.py", "def build():\n    import deepspeed"),
        ("mlomae/models/__init__.py", "from mlomae.training import trainer"),
        ("mlomae/checkpoint/writer.py", "from mlomae.training.task import Task"),
        ("mlomae/training/trainer.py", "from mlomae.pretraining.task import Pretraining"),
        ("mlomae/pretraining/task.py", "from mlomae.commands.plan import command"),
        ("mlomae/training/trainer.py", "from eval.knn import evaluate"),
        ("mlomae/training/trainer.py", "from tests import helpers"),
        ("mlomae/training/trainer.py", "from mlomae.checkpoint.writer import _CHUNK"),
        ("mlomae/new_folder/module.py", "from mlomae.errors import UserError"),
        ("data_ffcv/beton/info.py", "from data_ffcv.streams.loader import Stream"),
        ("data_ffcv/streams/loader.py", "from mlomae.errors import UserError"),
        ("data_ffcv/streams/loader.py", "from data_ffcv.pixels import _settings"),
        ("eval/knn.py", "import launch.pretrain"),
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"import torch\nfrom . import sibling\n{line}\n")
    assert len(wrong_imports(tmp_path)) == 1


# The circles of commit 9ca0d32: a late import on the way back, twice, and one for types alone.
CIRCLES = [
    {
        "mlomae/foreign/files.py": "from mlomae.weights import find_checkpoint",
        "mlomae/foreign/__init__.py": "from mlomae.foreign.files import read_tensors",
        "mlomae/weights.py": "def load():\n    from mlomae.foreign import read_tensors",
    },
    {
        "mlomae/hypergrad/zero_partitions.py": "from mlomae.hypergrad.partition import Partition",
        "mlomae/hypergrad/partition.py": (
            "def partition_of():\n    from mlomae.hypergrad.zero_partitions import engine_partition"
        ),
    },
    {
        "mlomae/models/mae.py": "from mlomae.models.masking import Scorer",
        "mlomae/models/masking.py": (
            "if TYPE_CHECKING:\n    from mlomae.models.mae import MaskedAutoencoder"
        ),
    },
]


@pytest.mark.parametrize("files", CIRCLES, ids=["foreign", "partition", "masking"])
def test_a_circle_is_seen(tmp_path, files):
    for path, line in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{line}\n")
    (circle,) = cycles(tmp_path)
    assert set(circle.split(" > ")) >= {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files
    }
    (tmp_path / path).write_text("import torch\n")
    assert cycles(tmp_path) == []


def test_importing_the_packages_loads_no_heavy_extra():
    code = (
        "import sys, mlomae, data_ffcv, eval\n"
        "print({'ffcv', 'flash_attn', 'numba', 'cv2'} & sys.modules.keys() or 'none')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.strip(), done.returncode) == ("none", 0), done.stderr


# --- what is installed -----------------------------------------------------------------------


@pytest.fixture
def metadata(monkeypatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def test_setup_py_has_the_promised_packages_and_extras(metadata):
    assert set(metadata["extras_require"]) == {*("datasets", "dev", "ffcv", "flash", "onnx")}
    assert {"mlomae.hypergrad", "mlomae.models", "data_ffcv", "eval"} <= set(metadata["packages"])
    assert {name.split(".")[0] for name in metadata["packages"]} == {"mlomae", "data_ffcv", "eval"}


def test_every_pin_is_exact_and_within_the_range_of_setup_py(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (exact,) = pin.specifier
        assert (exact.operator, pin.name.lower() in pins) == ("==", False), pin
        pins[pin.name.lower()] = exact.version
    ranges = metadata["install_requires"] + metadata["extras_require"]["dev"]
    for wanted in map(Requirement, ranges):
        assert wanted.specifier.contains(pins[wanted.name.lower()]), wanted
