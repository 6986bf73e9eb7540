"""launch/hostfile, launch/slurm.sh and launch/torchrun.sh, with stand-ins for what they call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from tests.ranks import ROOT

ARGUMENTS = [
    "launch/pretrain.py",
    "--recipe",
    "my recipe.yaml",
    "data.train=/data/$HOME/*.beton",
    'output_dir=it\'s "here"; exit 9',
    "pretrain.betas=[0.9, 0.95]",
    "",
    "two\nlines",
]

# Two nodes of two tasks each, one after the other; the largest exit code, as srun has it.
SRUN = """
while [[ $1 == --* ]]; do shift; done
largest=0
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || code=$?
  if ((${code:-0} > largest)); then largest=$code; fi
done
exit $largest
"""
SCONTROL = """
case $1 in
  show) printf 'node-7\\nnode-8\\n' ;;
  requeue) echo "$2" >>requeued ;;
esac
"""
RANK = f"""#!{sys.executable}
import json, os, sys
rank = os.environ["RANK"]
with open(f"rank{{rank}}.json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
sys.exit(int(os.environ["CODES"].split()[int(rank)]))
"""


class Machine:
    """A folder from which launch/slurm.sh and launch/torchrun.sh find stand-ins only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / ".venv" / "bin").mkdir(parents=True)
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "squeue": 'echo "$STATE"'}.items():
            self._write(f"bin/{name}", f"#!/usr/bin/env bash\n{body}\n")
        self._write(".venv/bin/python", RANK)
        self._write(".venv/bin/torchrun", RANK)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/ as job 123456 of SLURM."""
        slurm = {"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_ID": "123456"}
        slurm |= {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NTASKS_PER_NODE": "2"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments],
            cwd=self.folder,
            env=os.environ | slurm | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def rank(self, rank: int) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a rank."""
        arguments, environment = json.loads((self.folder / f"rank{rank}.json").read_text())
        return arguments, environment

    @property
    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_deepspeed_reads_the_hostfile_as_it_is() -> None:
    assert fetch_hostfile(str(ROOT / "launch" / "hostfile")) == {"node-a": 8, "node-b": 8}


def test_slurm_gives_every_rank_its_place_and_the_arguments_unharmed(machine: Machine) -> None:
    done = machine.run("slurm.sh", *ARGUMENTS, CODES="0 0 0 0", STATE="RUNNING")
    assert (done.returncode, machine.requeued) == (0, []), done.stderr
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    for rank in range(4):
        arguments, environment = machine.rank(rank)
        assert arguments == ["-u", *ARGUMENTS, "--resume"]
        place = [str(rank), str(rank % 2), "4", "2", "node-7", "23456"]
        assert [environment[name] for name in names] == place


@pytest.mark.parametrize(
    ("codes", "state", "restarts", "expected", "is_requeued"),
    [
        ("0 0 0 0", "RUNNING", "0", 0, False),
        ("143 143 143 143", "RUNNING", "0", 143, True),  # preempted, or its time is over
        ("143 143 143 143", "COMPLETING", "0", 143, False),  # scancel
        ("143 143 143 143", "RUNNING", "100", 143, False),
        ("75 75 143 75", "RUNNING", "2", 143, True),  # a hang, and one rank ended by srun
        ("75 75 75 75", "RUNNING", "0", 75, True),
        ("143 137 143 143", "RUNNING", "0", 143, True),
        ("137 137 137 137", "RUNNING", "0", 137, True),
        ("1 1 143 143", "RUNNING", "0", 1, False),  # the numbers broke down
        ("143 2 143 143", "RUNNING", "0", 2, False),  # bad input on one node
        ("1 2 1 1", "RUNNING", "0", 2, False),
        ("0 0 0 139", "RUNNING", "0", 139, False),
    ],
)
def test_slurm_queues_again_what_goes_on_by_itself(
    machine: Machine, codes: str, state: str, restarts: str, expected: int, is_requeued: bool
) -> None:
    done = machine.run(
        "slurm.sh", "launch/pretrain.py", CODES=codes, STATE=state, SLURM_RESTART_COUNT=restarts
    )
    assert done.returncode == expected, done.stderr
    assert machine.requeued == ["123456"] * is_requeued


def test_torchrun_gets_the_arguments_unharmed(machine: Machine) -> None:
    done = machine.run("torchrun.sh", "2", "node-7:29400", *ARGUMENTS, CODES="3", RANK="0")
    assert done.returncode == 3, done.stderr
    arguments, environment = machine.rank(0)
    assert arguments[-len(ARGUMENTS) - 1 :] == [*ARGUMENTS, "--resume"]
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert (options["--nnodes"], options["--rdzv-endpoint"]) == ("2", "node-7:29400")
    assert (options["--nproc-per-node"], options["--max-restarts"]) == ("gpu", "0")
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"


def test_torchrun_without_a_program_says_how(machine: Machine) -> None:
    done = machine.run("torchrun.sh", "2", "node-7:29400")
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
