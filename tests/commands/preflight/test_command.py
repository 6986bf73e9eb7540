"""`python -m mlomae preflight` on hosts behind a stand-in for ssh, each with another fault.

The stand-in runs the command here, in an environment and with a standard input that the host's
fault has changed, so that the probe meets a real refusal, another file, another package.
"""

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlomae.commands import preflight
from mlomae.commands.preflight.checks import CHECKS
from tests.ranks import ROOT, free_port

SSH = """#!/bin/bash
name="${@: -2:1}" command="${@: -1}" edit=
echo "$*" >>FAKE/calls
export PYTHONPATH=FAKE/site
[ -f FAKE/faults/"$name" ] && source FAKE/faults/"$name"
sed -u "$edit" | bash -c "$command"
"""

TORCH = """
import os
class cuda:
    device_count = staticmethod(lambda: int(os.environ.get("NUM_GPUS", 2)))
    class nccl:
        version = staticmethod(lambda: (2, 26, 2))
class version:
    cuda = "12.8"
"""

NVIDIA_SMI = """#!/bin/bash
for ((i = 0; i < ${NUM_GPUS:-2}; i++)); do
  echo "${GPU_NAME:-NVIDIA A100-SXM4-80GB}, 81920, 4, ${DRIVER:-570.1}"
done
"""

FULL = """
import shutil
kept = shutil._ntuple_diskusage
shutil.disk_usage = lambda path: kept(0, 0, 1 << 40 if "shm" in str(path) else 0)
"""

FAULTS = {  # host: (what its login does, the column that tells it, its cell, words of the sentence)
    "refused": ('echo "ssh: connect to host x port 22: Connection refused" >&2; exit 255',
                "ssh", "refused", "start it"),
    "locked": ('echo "user@x: Permission denied (publickey)." >&2; exit 255',
               "ssh", "no key", "ssh-copy-id"),
    "bare": ("command=/nowhere/python",
             "python", "missing", "install the environment at the same path"),
    "garbled": ("""command='echo; echo mlomae preflight probe; head -c 2000000 /dev/zero'""",
                "ssh", "lost", "makes no sense"),
    "mute": ("command='echo; echo mlomae preflight probe; echo killed by the kernel >&2'",
             "ssh", "lost", "(killed by the kernel)"),
    "other_timm": ("PYTHONPATH=FAKE/other_timm:$PYTHONPATH",
                   "packages", "timm", "timm is 9.9, but 1.0 on good"),
    "no_flash": ("PYTHONPATH=FAKE/other_site",
                "packages", "flash-attn", "but 0.0.1 on good"),
    "other_code": ("edit='s|FAKE/work|FAKE/other_work|g'",
                   "packages", "code", "bring all hosts to one commit"),
    "no_folder": ("edit='s|FAKE/work|FAKE/no_work|g'",
                  "packages", "no folder", "put the repository at the same path"),
    "few_gpus": ("export NUM_GPUS=1", "GPUs", "1 of 2", "slots=2, but there are 1 GPUs"),
    "other_gpus": ("export GPU_NAME='NVIDIA V100'", "GPUs", "differ", "NVIDIA V100 of 80 GiB"),
    "other_driver": ("export DRIVER=525.9", "CUDA", "driver", "525.9, but 570.1 on good"),
    "other_data": ("edit='s|FAKE/data|FAKE/other_data|g'", "data", "differs", "not the same con"),
    "no_data": ("edit='s|FAKE/data|FAKE/no_data|g'", "data", "missing", "No such file"),
    "read_only": ("edit='s|FAKE/runs|/proc/runs|g'", "output_dir", "no write", "cannot be written"),
    "unshared": ("edit='s|FAKE/runs|FAKE/work/runs|g'",
                 "output_dir", "not shared", "a filesystem that all hosts share"),
    "full": ("PYTHONPATH=FAKE/full:$PYTHONPATH", "space", "0.00 GiB", "free some space"),
    "late": ("PYTHONPATH=FAKE/late:$PYTHONPATH", "clock", "-3600 s", "s behind this machine's"),
    "walled": ("edit='s|\"port\": [0-9]*|\"port\": 1|'", "port", "closed", "Connection refused"),
    "astray": ("edit='s|\"word\": \"..|\"word\": \"xy|'", "port", "closed", "another machine ans"),
}  # fmt: skip

HEALTHY = ["good", "chatty"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins, the faults, and a recipe with its files."""
    fake = tmp_path_factory.mktemp("preflight")

    def write(name: str, text: str, mode: int = 0o644) -> None:
        (fake / name).parent.mkdir(parents=True, exist_ok=True)
        (fake / name).write_text(text.replace("FAKE", str(fake)))
        (fake / name).chmod(mode)

    def install(site: str, **versions: str) -> None:
        for name, version in versions.items():
            write(
                f"{site}/{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}"
            )

    write("bin/ssh", SSH, 0o755)
    write("bin/nvidia-smi", NVIDIA_SMI, 0o755)
    write("bin/hostname", "#!/bin/bash\necho 127.0.0.1 10.0.0.1\n", 0o755)
    write("bin/pdsh", "", 0o755)
    for site in ("site", "other_site"):
        write(f"{site}/torch.py", TORCH)
        install(site, torch="2.7", deepspeed="0.19.8", timm="1.0", torchvision="0.22")
        install(site, numpy="2.2", safetensors="0.6", mlomae="0.1.0")
    install("site", flash_attn="0.0.1")
    install("other_timm", timm="9.9")
    write("late/sitecustomize.py", "import time\nn = time.time\ntime.time = lambda: n() - 3600\n")
    write("full/sitecustomize.py", FULL)
    for folder, line in (("work", "one = 1"), ("other_work", "one = 2")):
        write(f"{folder}/mlomae/__init__.py", line)
    for folder, byte in (("data", "a"), ("other_data", "b")):
        write(f"{folder}/train.beton", "x" * 5000 + byte + "x" * 5000)
        write(f"{folder}/train.beton.json", "{}")
    for name, (login, *_) in FAULTS.items():
        write(f"faults/{name}", login)
    (fake / "runs").mkdir()
    write("faults/chatty", "echo welcome; echo -n 'to this host'")
    return fake


@pytest.fixture
def launch(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command in the folder `work`: (exit code, stdout, stderr)."""
    monkeypatch.setenv("PATH", f"{place / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(place / "work")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = preflight.main(["--master_port", str(free_port()), *arguments])
        return code, *capsys.readouterr()

    return run


def hostfile(place: Path, *names: str) -> str:
    file = place / "hostfile"
    file.write_text("".join(f"{name} slots=2\n" for name in names))
    return str(file)


def recipe(place: Path, **more: Any) -> str:
    values = yaml.safe_load((ROOT / "launch/recipes/quickstart_mlo_mae.yaml").read_text())
    values["data"]["train"] = str(place / "data/train.beton")
    values |= {"output_dir": str(place / "runs/new/run"), **more}
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(place / "recipe.yaml")


def table_of(output: str) -> dict[str, dict[str, str]]:
    """Cells by host and column."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert header == ["host", *CHECKS]
    return {row[0]: dict(zip(CHECKS, row[1:], strict=True)) for row in rows}


def is_good(cell: str) -> bool:
    return cell == "ok" or cell.startswith("ok ")


def test_each_fault_shows_in_its_hosts_cell_and_in_a_sentence(place: Path, launch: Any) -> None:
    hosts = hostfile(place, *HEALTHY, *FAULTS)
    code, output, _ = launch("--hostfile", hosts, "--recipe", recipe(place))
    cells = table_of(output)
    assert code == 2
    assert list(cells) == [*HEALTHY, *FAULTS]
    for name in HEALTHY:
        assert all(map(is_good, cells[name].values())), (name, cells[name])
    for name, (_, column, cell, words) in FAULTS.items():
        wrong = {key: text for key, text in cells[name].items() if not is_good(text)}
        assert {key: text for key, text in wrong.items() if text != "-"} == {column: cell}, name
        (line,) = (line for line in output.splitlines() if line.startswith(f"{name}: ")
                   and words in line)  # fmt: skip
        assert line.endswith(".") and str(place) not in line.partition(":")[0]
    # what was compared, honestly
    assert "train.beton: 2 files, compared by size and SHA-256 of all bytes." in output
    assert not list(place.rglob(".preflight_*")) and not list((place / "runs").iterdir())
    # the shell of a host gets options and one constant, and no file's words
    calls = (place / "calls").read_text().splitlines()
    assert all("BatchMode=yes" in call and sys.executable in call for call in calls)
    assert not any("train.beton" in call or "runs" in call for call in calls)


def test_equal_hosts_are_well(place: Path, launch: Any) -> None:
    code, output, _ = launch(
        "--hostfile", hostfile(place, "a-1.local", "user@10.0.0.2"), "--recipe", recipe(place)
    )
    assert (code, output.splitlines()[-1]) == (0, "All is well.")
    assert all(is_good(cell) for row in table_of(output).values() for cell in row.values())
    assert "a-1.local has 2 GPUs (NVIDIA A100-SXM4-80GB of 80 GiB), driver 570.1" in output
    assert list((place / "runs").iterdir()) == []


def test_hosts_without_gpus_run_processes(
    place: Path, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUM_GPUS", "0")
    code, output, _ = launch("--hostfile", hostfile(place, "a", "b"))
    assert code == 0, output
    assert "No host has a GPU: slots are processes on the CPU." in output
    assert "Not checked without --recipe: data and output_dir." in output
    cells = table_of(output)["b"]
    assert cells["GPUs"] == "none" and cells["data"] == cells["output_dir"] == "-"


def test_this_machine_alone(launch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real packages, without a stand-in."""
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    monkeypatch.chdir(ROOT)
    code, output, _ = launch("--output_dir", str(tmp_path / "run"))
    assert code == 0, output
    (cells,) = table_of(output).values()
    assert cells["ssh"] == "-" and cells["packages"] == "ok" and is_good(cells["port"])
    import torch

    assert f"torch {torch.__version__}" in output


def test_ssh_is_called_as_pdsh_calls_it(
    place: Path, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-q -o 'ProxyJump=gate way'")
    (place / "calls").unlink(missing_ok=True)
    code, *_ = launch("--hostfile", hostfile(place, "a"), "--ssh_port", "2222")
    (call,) = (place / "calls").read_text().splitlines()
    assert code == 0
    assert call.startswith("-q -o ProxyJump=gate way -a -x ") and " -p 2222 -- a " in call


def test_a_port_in_use_is_told(place: Path, launch: Any) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, output, _ = launch(
            "--hostfile", hostfile(place, "a", "b"), "--master_port", str(port)
        )
    cells = table_of(output)
    assert (code, cells["a"]["port"], cells["b"]["port"]) == (2, "not free", "-")
    assert f"a: port {port} cannot be opened (Address already in use)" in output


def test_what_an_answer_says_does_not_reach_the_terminal_raw(place: Path, launch: Any) -> None:
    (place / "faults/painter").write_text("export DRIVER=$'\\e[31m5'")
    code, output, _ = launch("--hostfile", hostfile(place, "good", "painter"))
    assert code == 2
    assert "\x1b" not in output and "?[31m5, but 570.1 on good" in output


def test_pdsh_is_missed(place: Path, launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a PATH with the stand-ins alone, and what they call."""
    for tool in ("ssh", "hostname", "nvidia-smi", "sed", "bash"):
        (place / "tools").mkdir(exist_ok=True)
        (place / "tools" / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setenv("PATH", str(place / "tools"))
    code, output, _ = launch("--hostfile", hostfile(place, "a", "b"))
    assert code == 2
    assert output.splitlines()[-1].startswith("this machine: pdsh is missing")
