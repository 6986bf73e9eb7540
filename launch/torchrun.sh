#!/usr/bin/env bash
# A training program by torchrun, which needs no ssh: the same command on every node, in the clone's
# folder, within ten minutes of each other.
#
#   bash launch/torchrun.sh NUM_NODES HEAD:PORT launch/pretrain.py --recipe R --deepspeed_config D ...
#
#   NUM_NODES     as many nodes as run this
#   HEAD:PORT     one of them, by the name that all know it by, and a free port there
#
#   MLOMAE_RANKS_PER_NODE  ranks on this node (default gpu: one for each)
#
# torchrun ends with 1 whatever the ranks ended with; their exit codes stand in its last lines.
set -euo pipefail

if (($# < 3)); then
  printf 'usage: bash launch/torchrun.sh NUM_NODES HEAD:PORT PROGRAM [ARGUMENT...]\n' >&2
  exit 2
fi
num_nodes=$1 endpoint=$2
shift 2

export PATH=$PWD/.venv/bin:$PATH
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this clone's code, whatever .venv was made for
# Seconds in which ranks can finish their cycle and save when torchrun is stopped (its default is 30,
# and it always gives 30 when a rank has ended by itself).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# No restarts: torchrun's would start from scratch in a folder that holds a run. --resume goes on.
exec torchrun --nnodes "$num_nodes" --nproc-per-node "${MLOMAE_RANKS_PER_NODE:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id mlomae --max-restarts 0 \
  "$@" --resume
