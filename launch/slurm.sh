#!/usr/bin/env bash
# A training program on a SLURM cluster, one process per GPU; from the clone's folder:
#
#   sbatch launch/slurm.sh launch/pretrain.py --recipe R --deepspeed_config D [key=value ...]
#
# Options of sbatch, given before the script, replace those below: sbatch --nodes 4 launch/slurm.sh ...
# The job saves and is queued again when its time is over, when it is preempted and when a rank
# hangs, and goes on where it was; `scancel` saves and ends it. launch/README.md says more.
#
#   MLOMAE_PYTHON         the interpreter (default .venv/bin/python)
#   MLOMAE_MAX_REQUEUES   how often the job may start again (default 100)

#SBATCH --job-name=mlomae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# --gpus-per-node, not --gpus-per-task: a rank picks its GPU by LOCAL_RANK, so it has to see them all.
# --mem=0 is all the memory of a node. --signal has to leave time for one cycle and one checkpoint.

set -euo pipefail

requeue() {
  local count=${SLURM_RESTART_COUNT:-0} state
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) || state=UNKNOWN
  if [ "$state" != RUNNING ]; then
    printf 'slurm.sh: exit code %d, and the job is %s: not queued again\n' "$code" "$state" >&2
  elif ((count >= ${MLOMAE_MAX_REQUEUES:-100})); then
    printf 'slurm.sh: exit code %d after %d restarts: not queued again\n' "$code" "$count" >&2
  else
    printf 'slurm.sh: exit code %d: queued again\n' "$code" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

cd -- "$SLURM_SUBMIT_DIR" # this file runs as a copy in a folder of SLURM's
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this clone's code, whatever .venv was made for
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself

trap : TERM # scancel signals this shell, too, which has to outlive the ranks

# One process: SLURM's names become those that PyTorch reads. srun gives the largest exit code, and
# --kill-on-bad-exit ends the others as if they had been stopped (143), so errors are lifted above.
# shellcheck disable=SC2016  # for the shell of each process
rank='trap : TERM # as above; Python gets the signal, too
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
"$@"
code=$?
if [ "$code" = 1 ] || [ "$code" = 2 ]; then exit $((200 + code)); fi
exit "$code"'

# srun starts the ranks itself: no launcher stands between them and SLURM's signals and codes.
code=0
srun --kill-on-bad-exit=1 bash -c "$rank" rank \
  "${MLOMAE_PYTHON:-.venv/bin/python}" -u "$@" --resume || code=$?
case $code in
  201 | 202) code=$((code - 200)) ;;
  143 | 75 | 137) requeue ;; # saved and stopped; a rank hung; a rank was killed
esac
exit "$code"
