"""How the two shell commands start: what set-up checks, installs and refuses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT

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
