"""`deepspeed --hostfile` on two hosts: equal to one host; stopped and killed on one of them."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.ranks import launched
from tests.multinode.launches import ENVIRONMENT, Cluster, Launch
from tests.ranks import ROOT
from tests.runs import contents, metrics_rows

pytestmark = pytest.mark.timeout(600)
NUM_CYCLES = 8


@pytest.fixture
def one_host(cluster: Cluster, server: Any) -> Any:
    """Makes a run of so many ranks on one host, which nothing befalls."""

    def run(num_ranks: int, stage: int) -> Path:
        folder = cluster.folder / f"one_host_{num_ranks}_{stage}"
        if not folder.exists():
            arguments = cluster.arguments(folder.name, stage, beton="node-a")
            with launched(server, cluster.folder, arguments, num_ranks=num_ranks) as launch:
                assert launch.finish() == [0] * num_ranks, launch.output
        return folder

    return run


def finish(cluster: Cluster, slots: int, arguments: list[str]) -> str:
    with cluster.launched(*cluster.deepspeed(slots, arguments)) as launch:
        assert launch.wait() == 0, launch.output
        return launch.output


def assert_equal(run: Path, reference: Path) -> None:
    """Metrics without clocks, and every bit of weights and optimizers."""
    newest = f"checkpoints/step_{2 * NUM_CYCLES:08d}"
    assert [record["cycle"] for record in metrics_rows(run)] == list(range(1, NUM_CYCLES + 1))
    assert metrics_rows(run) == metrics_rows(reference)
    assert len(contents(run / newest)) > 100
    assert contents(run / newest) == contents(reference / newest)


def on_host_b(launch: Launch, slots: int) -> list[psutil.Process]:
    """The ranks of the second host."""
    ranks = launch.ranks()
    assert sorted(ranks) == list(range(2 * slots)), launch.output
    return [ranks[rank] for rank in range(slots, 2 * slots)]


@pytest.mark.parametrize(
    ("slots", "stage"),
    [
        (2, 1),
        pytest.param(2, 3, marks=pytest.mark.slow),
        pytest.param(1, 1, marks=pytest.mark.slow),
    ],
)
def test_two_hosts_give_the_bits_of_one(
    cluster: Cluster, one_host: Any, slots: int, stage: int
) -> None:
    run = cluster.folder / f"two_hosts_{slots}_{stage}"
    output = finish(cluster, slots, cluster.arguments(run.name, stage))
    assert "node-a: " in output and "node-b: " in output
    assert_equal(run, one_host(2 * slots, stage))


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_on_one_host_saves_on_both_and_resume_goes_on(
    cluster: Cluster, one_host: Any, slots: int
) -> None:
    run = cluster.folder / f"stopped_{slots}"
    arguments = cluster.arguments(run.name, 3)
    with cluster.launched(*cluster.deepspeed(slots, arguments)) as launch:
        launch.wait_for_cycles(run, 3)
        for process in on_host_b(launch, slots):
            process.terminate()
        assert launch.wait() == 128 + signal.SIGTERM, launch.output
    assert "stopped by SIGTERM after saving" in launch.output
    assert not (run / "summary.json").exists()

    output = finish(cluster, slots, [*arguments, "--resume"])
    assert "resumed from" in output
    assert_equal(run, one_host(2 * slots, 3))


@pytest.mark.slow
def test_a_killed_rank_ends_both_hosts_and_resume_goes_on(cluster: Cluster, one_host: Any) -> None:
    run = cluster.folder / "killed"
    arguments = cluster.arguments(run.name, 1)
    command = " ".join(cluster.deepspeed(2, arguments))
    left = "pgrep --full --count -- '-[u] launch/pretrain.py'"
    look = f"sleep 2; echo left on A: $({left}), on B: $(ssh node-b {shlex.quote(left)})"
    with cluster.launched("bash", "-c", f"{command}; code=$?; {look}; exit $code") as launch:
        launch.wait_for_cycles(run, 3)
        on_host_b(launch, 2)[0].kill()
        assert launch.wait() == 256 - signal.SIGKILL, launch.output
    assert "left on A: 0, on B: 0\n" in launch.output

    output = finish(cluster, 2, [*arguments, "--resume"])
    assert "resumed from" in output
    assert_equal(run, one_host(4, 1))


@pytest.mark.slow
def test_torchrun_stops_and_resumes_as_well(cluster: Cluster, one_host: Any) -> None:
    run = cluster.folder / "torchrun"
    arguments = cluster.arguments(run.name, 1)
    ours = ["bash", "launch/torchrun.sh", "2", "node-a:29400", "launch/pretrain.py", *arguments]
    variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    same = shlex.join(["env", "MLOMAE_RANKS_PER_NODE=1", *variables, *ours])
    everywhere = (
        f"ssh node-b {shlex.quote(f'cd {ROOT}; {same}')} & {same}; code=$?; wait; exit $code"
    )
    with cluster.launched("bash", "-c", everywhere) as launch:
        launch.wait_for_cycles(run, 3)
        on_host_b(launch, 1)[0].terminate()
        assert launch.wait() == 1, launch.output  # torchrun's own
    assert "stopped by SIGTERM after saving" in launch.output
    assert "exitcode  : 143" in launch.output

    with cluster.launched("bash", "-c", everywhere) as launch:
        assert launch.wait() == 0, launch.output
    assert "resumed from" in launch.output
    assert_equal(run, one_host(2, 1))


@pytest.mark.slow
def test_preflight_sees_what_differs_between_hosts(cluster: Cluster) -> None:
    hostfile = cluster.deepspeed(1, [])[2]
    words = ["-m", "mlomae", "preflight", "--hostfile", hostfile]
    good = cluster.arguments("planned", 2)
    with cluster.launched(sys.executable, *words, *good) as launch:
        assert launch.wait() == 0, launch.output

    bad = [*good, f"output_dir={cluster.folder / 'local' / 'run'}"]
    with cluster.launched(sys.executable, *words, *bad) as launch:
        assert launch.wait() == 2, launch.output
    problems = [line for line in launch.output.splitlines() if line.startswith("node-")]
    assert any("is not the same folder as on node-a" in problem for problem in problems)
