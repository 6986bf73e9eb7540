#!/usr/bin/env bash
# Starts SLURM on the two hosts of hosts.sh, from node-a: bash slurm_up.sh FOLDER
# Jobs of the partition `high` preempt those of `low`, which then have a minute to end.
set -euo pipefail

export SLURM_CONF=$1/slurm.conf

start_daemons() {
  local own
  own=$1/$(hostname)
  mkdir -p "$own" /run/munge # /run is the host's own
  munged --force --key-file "$1/munge.key" --socket /run/munge/munge.socket.2 \
    --pid-file "$own/munged.pid" --log-file "$own/munged.log" --seed-file "$own/munged.seed"
  if [ "$(hostname)" = node-a ]; then slurmctld; fi
  slurmd -N "$(hostname)"
}

configure() {
  rm -rf "$1" # what an earlier start knew of the nodes
  mkdir -p "$1"
  head -c 1024 /dev/urandom >"$1/munge.key"
  chmod 400 "$1/munge.key"
  cat >"$SLURM_CONF" <<TEXT
ClusterName=two
SlurmctldHost=node-a
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$1/state
SlurmctldPidFile=$1/slurmctld.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdSpoolDir=$1/spool-%n
SlurmdPidFile=$1/slurmd-%n.pid
SlurmdLogFile=$1/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node-a,node-b
PartitionName=low Nodes=node-a,node-b Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node-a,node-b PriorityTier=10 PreemptMode=OFF
TEXT
}

if [ "${2:-}" != daemons ]; then
  configure "$1"
  ssh node-b bash "$(realpath -- "$0")" "$1" daemons </dev/null
fi
start_daemons "$1"
