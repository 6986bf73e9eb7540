#!/usr/bin/env bash
# Two hosts on one machine, node-a and node-b: see usage below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash tests/multinode/hosts.sh FOLDER COMMAND [ARGUMENT...]

Runs COMMAND on node-a of two hosts, each with its own network, processes, hostname, /dev/shm and
sshd, which share this machine's files. Either reaches the other by `ssh node-a`, `ssh node-b`.

  FOLDER   for keys and logs; FOLDER/local is each host's own disk (FOLDER/node-a/, FOLDER/node-b/)
  COMMAND  for example bash

The exit code is COMMAND's; 77 where this machine cannot have such hosts. Nothing outside FOLDER is
changed, and when the script ends, however it ends, every process of both hosts is gone.
TEXT
}

self=$(realpath -- "${BASH_SOURCE[0]}")
hosts=(node-a node-b)

address() { case $1 in node-a) printf 10.77.0.1 ;; node-b) printf 10.77.0.2 ;; esac; }

# --- outside: can this be? -----------------------------------------------------------------

cannot() {
  printf 'skipped: %s\n' "$*" >&2
  exit 77
}

check() {
  local tool reason
  for tool in unshare nsenter setpriv ip mount pgrep pdsh ssh ssh-keygen sshd; do
    command -v "$tool" >/dev/null || cannot "there is no $tool here (apt: iproute2 openssh-server pdsh procps)"
  done
  [ "$(id -u)" = 0 ] || cannot "network namespaces with an sshd each need root"
  reason=$(unshare --net --mount --pid --uts --fork --mount-proc bash -ec \
    'ip link add eth0 type veth peer name eth1; mount -t tmpfs tmpfs /dev/shm' 2>&1) ||
    cannot "namespaces are not permitted here ($reason)"
}

make_keys() {
  local host
  rm -rf "$folder"/{key,key.pub,authorized_keys,known_hosts}
  ssh-keygen -q -t ed25519 -N '' -C throw-away -f "$folder/key"
  cp "$folder/key.pub" "$folder/authorized_keys"
  for host in "${hosts[@]}"; do
    mkdir -p "$folder/$host"
    rm -f "$folder/$host".key{,.pub}
    ssh-keygen -q -t ed25519 -N '' -C "$host" -f "$folder/$host.key"
    printf '%s,%s %s\n' "$host" "$(address "$host")" "$(cat "$folder/$host.key.pub")"
  done >"$folder/known_hosts"
  {
    printf '127.0.0.1 localhost\n'
    for host in "${hosts[@]}"; do printf '%s %s\n' "$(address "$host")" "$host"; done
  } >"$folder/etc_hosts"
  cat >"$folder/ssh_config" <<TEXT
Host *
  IdentityFile $folder/key
  UserKnownHostsFile $folder/known_hosts
  StrictHostKeyChecking yes
TEXT
}

# --- between: first process of a space that holds both hosts -----------------------------------

# Its end ends every process inside.
join_hosts() {
  local host pids=() code=0
  for host in "${hosts[@]}"; do
    unshare --net --mount --pid --uts --ipc --fork --mount-proc --kill-child \
      bash "$self" --host "$folder" "$host" >"$folder/$host.log" 2>&1 </dev/null &
    pids+=("$(wait_for pgrep --parent $!)")
  done
  ip link add eth0 netns "${pids[0]}" type veth peer name eth0 netns "${pids[1]}"
  for host in "${hosts[@]}"; do wait_for grep -qs 'Server listening' "$folder/$host.log"; done
  nsenter --all --target "${pids[0]}" --wd="$PWD" "$@" || code=$?
  return "$code"
}

# Repeats a command until it succeeds, for ten seconds.
wait_for() {
  local _
  for _ in {1..200}; do
    if "$@"; then return; fi
    sleep 0.05
  done
  printf 'error: gave up waiting for: %s\n' "$*" >&2
  return 1
}

# --- inside: first process of a host ------------------------------------------------------------

run_host() {
  hostname "$1"
  mount --bind "$folder/etc_hosts" /etc/hosts
  mount --bind "$folder/ssh_config" /etc/ssh/ssh_config
  mount --bind "$folder/$1" "$folder/local"
  mount -t tmpfs tmpfs /dev/shm
  mount -t tmpfs tmpfs /run
  if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
  mkdir /run/sshd
  wait_for ip link set eth0 up 2>/dev/null
  ip link set lo up
  ip address add "$(address "$1")/24" dev eth0
  "$(command -v sshd)" -D -e -f /dev/null -h "$folder/$1.key" \
    -o AuthorizedKeysFile="$folder/authorized_keys" -o StrictModes=no -o PidFile=none \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PermitRootLogin=yes &
  wait
}

case ${1:-} in
  --host)
    folder=$2
    run_host "$3"
    ;;
  --join)
    folder=$2
    join_hosts "${@:3}"
    ;;
  '' | --help | -h) usage ;;
  *)
    (($# >= 2)) || { usage >&2 && exit 2; }
    check
    mkdir -p "$1/local"
    folder=$(realpath -- "$1")
    make_keys
    exec setpriv --pdeathsig KILL unshare --net --mount --pid --fork --mount-proc \
      --kill-child bash "$self" --join "$folder" "${@:2}"
    ;;
esac
