"""The rules of the house: which room may import which, what is installed, how it is started."""

import ast
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# room -> the rooms it may import besides itself
ARROWS = {
    "mlomae.hypergrad": set(),
    "mlomae.models": {"mlomae.errors"},
    "mlomae.errors": set(),
    "data_ffcv": set(),
    "mlomae": {"mlomae.hypergrad", "mlomae.models", "mlomae.errors", "data_ffcv"},
    "eval": {"mlomae", "mlomae.hypergrad", "mlomae.models", "mlomae.errors", "data_ffcv"},
    "launch": {"eval", "mlomae", "mlomae.hypergrad", "mlomae.models", "mlomae.errors", "data_ffcv"},
    "tests": set(),
}
# room -> third-party packages that would give away that it knows too much
STRANGERS = {
    "mlomae.hypergrad": {"timm", "torchvision", "ffcv", "PIL"},
    "mlomae.models": {"deepspeed", "ffcv"},
    "data_ffcv": {"deepspeed"},
}


def room_of(module: str) -> str | None:
    """Return the innermost room that holds a dotted name, None for somebody else's."""
    homes = [room for room in ARROWS if f"{module}.".startswith(f"{room}.")]
    return max(homes, key=len, default=None)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, root: Path) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, inside functions too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    """Return "file imports name" for every arrow that points the wrong way."""
    wrong = []
    for top in sorted({room.split(".")[0] for room in ARROWS} - {"tests"}):
        for path in sorted((root / top).rglob("*.py")):
            room = room_of(module_name(path, root))
            for name in imported_names(path, root):
                target = room_of(name)
                foreign = target not in {None, room, *ARROWS[room]}
                if foreign or name.split(".")[0] in STRANGERS.get(room, ()):
                    wrong.append(f"{path.relative_to(root)} imports {name}")
    return wrong


def test_dependencies_point_one_way():
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("mlomae/hypergrad/level.py", "import mlomae.errors"),
        ("mlomae/hypergrad/level.py", "from ..models import mae"),
        ("mlomae/hypergrad/level.py", "from .. import errors"),
        ("mlomae/models/mae.py", "def build():\n    import deepspeed"),
        ("mlomae/models/__init__.py", "from mlomae import trainer"),
        ("mlomae/training/trainer.py", "from eval.knn import evaluate"),
        ("mlomae/training/trainer.py", "from tests import helpers"),
        ("data_ffcv/streams/loader.py", "from mlomae.errors import UserError"),
        ("eval/knn.py", "import launch.pretrain"),
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"import torch\nfrom . import sibling\n{line}\n")
    assert len(wrong_imports(tmp_path)) == 1


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
    assert set(metadata["extras_require"]) == {
        *("datasets", "dev", "ffcv", "flash", "hub", "onnx", "wandb")
    }
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


# --- how it is started -----------------------------------------------------------------------

TOOLS = ["bash", "cat", "dirname", "env", "grep", "mkdir", "realpath", "rm", "sha256sum", "tail"]


class Machine:
    """A clone beside a PATH with nothing on it but the named tools and stubs.

    Every stub notes its call in `calls`. As it comes, the machine has an apt-get that works, a
    Python and a compiler, no library, and a user who is neither root nor allowed to sudo.
    """

    def __init__(self, folder: Path) -> None:
        self.clone, self.bin, self.calls = folder / "clone", folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "launch", self.clone / "launch")
        for name in ("setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.clone)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name, body in {
            "apt-get": "exit 0",
            "g++": "exit 0",
            "id": "echo 1000",
            "pkg-config": "exit 1",
            "python3": "exit 0",
            "sudo": "exit 1",
        }.items():
            self.stub(name, body)

    def stub(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.calls}"\n{body}\n')
        (self.bin / name).chmod(0o755)

    def called(self, name: str) -> bool:
        return any(line.startswith(f"{name} ") for line in self.calls.read_text().splitlines())

    def bash(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            ["bash", *arguments],
            cwd=self.clone,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def set_up(self) -> subprocess.CompletedProcess[str]:
        return self.bash("-c", "set -euo pipefail; source launch/setup.sh; setup_machine")


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_without_root_or_sudo_the_one_line_to_run_is_printed(machine):
    done = machine.set_up()
    line = "sudo apt-get update && sudo apt-get install -y libturbojpeg0-dev libopencv-dev"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, line)
    assert not machine.called("apt-get")
    assert not (machine.clone / ".venv").exists()


def test_without_apt_get_the_missing_libraries_are_named(machine):
    (machine.bin / "apt-get").unlink()
    done = machine.set_up()
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no apt-get here")
    assert "libturbojpeg0-dev libopencv-dev" in done.stderr


def test_an_old_python_is_refused_before_anything_is_installed(machine):
    machine.stub("id", "echo 0")
    machine.stub("python3", "echo Python 3.9.2; exit 1")
    done = machine.set_up()
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.9.2 is too old: install Python 3.10 or newer")
    assert not machine.called("apt-get")


def test_a_failed_stage_shows_the_end_of_the_log(machine):
    machine.stub("id", "echo 0")
    machine.stub("apt-get", "echo no space left on device; exit 1")
    done = machine.set_up()
    assert done.returncode == 1
    assert "no space left on device\nerror: 'system packages" in done.stderr


def test_a_library_that_apt_did_not_bring_is_named(machine):
    machine.stub("id", "echo 0")
    done = machine.set_up()
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: after installing, still no libturbojpeg0-dev")


def test_a_ready_machine_is_left_alone_until_the_pins_change(machine):
    machine.stub("pkg-config", "exit 0")
    (machine.clone / ".venv").mkdir()
    machine.bash("-c", "source launch/setup.sh; stamp_key >.venv/setup.stamp")
    done = machine.set_up()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    (machine.clone / "constraints.txt").write_text("torch==2.6.0\n")
    done = machine.set_up()
    assert "setup: virtual environment" in done.stdout


def test_quickstart_help_names_every_flag(machine):
    done = machine.bash("launch/quickstart.sh", "--help")
    assert done.returncode == 0
    assert "--data DIR" in done.stdout and "--output DIR" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "3"], "--epochs"),
        (["--data", "nowhere"], "nowhere"),
        (["--data"], "--data"),
        (["--output", ""], "--output"),
    ],
)
def test_quickstart_refuses_bad_arguments_before_installing(machine, arguments, named):
    done = machine.bash("launch/quickstart.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not (machine.clone / ".venv").exists() and not machine.calls.exists()
