"""launch/slurm.sh on a real SLURM of two nodes, one rank each: preempted, cancelled, refused."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.multinode.launches import Cluster
from tests.ranks import ROOT
from tests.runs import metrics_rows

MISSING = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # SLURM waits two minutes before it starts a job again
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"there is no {', '.join(MISSING)} (apt: slurmctld slurmd slurm-client munge)",
    ),
]

# Words for a shell of node-a. `submit` prints the job's number, `outcome` how a job ended.
WORDS = """
set -eu
export SLURM_CONF=$HERE/slurm/slurm.conf
submit() {
  sbatch --parsable --partition low --output $HERE/job.log \\
    --ntasks-per-node 1 --gpus-per-node 0 --cpus-per-task 1 --mem 1 "$@"
}
until_cycle() { until [ "$(wc -l <"$1/metrics.jsonl")" -ge "$2" ]; do sleep 0.1; done 2>/dev/null; }
until_gone() { while squeue --noheader --jobs "$1" | grep -q .; do sleep 0.5; done 2>/dev/null; }
outcome() {
  scontrol show job "$1" | grep -Eo '(JobState|Restarts|ExitCode)=[A-Z0-9:]*' | xargs echo outcome
}
bash $ROOT/tests/multinode/slurm_up.sh $HERE/slurm
until [ "$(sinfo --noheader --format %t --partition low)" = idle ]; do sleep 0.2; done
"""


def play(cluster: Cluster, run: str, script: str, *more: str) -> tuple[str, str]:
    """Submit a run, do what a script says with $job and $run, wait until the job is gone.

    Returns:
        How the job ended, and its log.
    """
    log = cluster.folder / "job.log"
    log.unlink(missing_ok=True)
    arguments = shlex.join(["launch/pretrain.py", *cluster.arguments(run, 3, *more)])
    variables = f"ROOT={ROOT} HERE={cluster.folder} run={cluster.folder / run}"
    whole = f"""
        export {variables} MLOMAE_PYTHON={sys.executable}
        {WORDS}
        job=$(submit launch/slurm.sh {arguments})
        {script}
        until_gone $job; outcome $job
    """
    with cluster.launched("bash", "-c", whole) as launch:
        assert launch.wait(600) == 0, launch.output
    (line,) = (line for line in launch.output.splitlines() if line.startswith("outcome "))
    return line, log.read_text()


def test_a_preempted_job_saves_and_goes_on(cluster: Cluster) -> None:
    preempt = """
        until_cycle $run 2
        sbatch --partition high --exclusive --nodes 2 --output /dev/null --wrap 'sleep 1'
    """
    outcome, log = play(cluster, "preempted", preempt)
    assert outcome == "outcome JobState=COMPLETED Restarts=1 ExitCode=0:0", log
    assert "slurm.sh: exit code 143: queued again" in log and "resumed from" in log
    run: Path = cluster.folder / "preempted"
    assert [record["cycle"] for record in metrics_rows(run)] == list(range(1, 9))


def test_a_cancelled_job_saves_and_ends(cluster: Cluster) -> None:
    outcome, log = play(cluster, "cancelled", "until_cycle $run 2; scancel $job", "epochs=400")
    assert outcome == "outcome JobState=CANCELLED Restarts=0 ExitCode=143:0", log
    assert "stopped by SIGTERM after saving" in log and "not queued again" in log


def test_bad_input_on_one_node_ends_the_job(cluster: Cluster) -> None:
    train = cluster.folder / "node-b" / "train.beton"
    away = train.rename(train.with_name("away"))
    outcome, log = play(cluster, "refused", "")
    away.rename(train)
    assert outcome == "outcome JobState=FAILED Restarts=0 ExitCode=2:0", log
    assert "queued again" not in log
