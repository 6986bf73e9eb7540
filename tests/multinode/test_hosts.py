"""The hosts themselves: apart where hosts are apart, gone when they should be, skipped with why."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.multinode.launches import CANNOT, HOSTS, Cluster


def test_hosts_are_apart_and_reach_each_other(hosts: Cluster) -> None:
    for name in ("node-a", "node-b"):
        (hosts.folder / name / "name").write_text(f"disk of {name}\n")
    look = f"hostname; hostname -I; cat {hosts.folder}/local/name; pgrep --count --exact ssh"
    done = hosts.run("bash", "-c", f"{look}; ssh node-b 'sleep 0.1; {look}; exit 3'")
    assert done.stdout.split("\n") == [
        *("node-a", "10.77.0.1 ", "disk of node-a", "0"),
        *("node-b", "10.77.0.2 ", "disk of node-b", "0"),  # node-a's ssh is out of its sight
        "",
    ]
    assert done.returncode == 3


def test_nothing_of_the_hosts_outlives_the_script(hosts: Cluster) -> None:
    with hosts.launched("bash", "-c", "ssh node-b sleep 1000; true") as launch:
        launch.wait_until(lambda: len(launch.find("sleep", "1000")) == 1)
        processes = launch.processes()
        launch.process.kill()
        gone, alive = psutil.wait_procs(processes, timeout=20)
    assert len(gone) >= 8 and not alive


@pytest.mark.parametrize(
    ("tool", "body", "reason"),
    [
        ("unshare", "echo unshare: Operation not permitted >&2; exit 1", "not permitted"),
        ("id", "echo 1000", "need root"),
    ],
)
def test_where_hosts_cannot_be_the_reason_is_said(
    tmp_path: Path, tool: str, body: str, reason: str
) -> None:
    (tmp_path / tool).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / tool).chmod(0o755)
    done = subprocess.run(
        ["bash", str(HOSTS), str(tmp_path / "hosts"), "true"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == CANNOT
    assert done.stderr.startswith("skipped: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr or "there is no" in done.stderr
