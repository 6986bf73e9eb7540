#!/usr/bin/env bash
# From a fresh clone to a learned mask, in one command; see usage below.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [--data DIR] [--output DIR]

Sets the machine up, trains MLO-MAE and MAE on real images for a few minutes, and
compares both encoders with an untrained one.

  --data DIR    your own images, as DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE
                (default: Fashion-MNIST)
  --output DIR  folder for the report, pictures, metrics and checkpoints
                (default: runs/quickstart in the clone)
TEXT
}

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

output=runs/quickstart
data=()
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --data | --output)
      [ -n "${2:-}" ] || refuse "$1 needs a folder, as in $1 DIR"
      path=$(realpath -m -- "$2") # given from where the user stands, not from the clone
      if [ "$1" = --output ]; then output=$path; else data=(--data "$path"); fi
      shift 2
      ;;
    *) refuse "unknown argument $1: the quickstart knows --data DIR, --output DIR and --help" ;;
  esac
done
if ((${#data[@]})) && [ ! -d "${data[1]}" ]; then
  refuse "--data ${data[1]} is not a folder: name one with one subfolder of images per class"
fi

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
setup_machine
cd -- "$MLOMAE_ROOT"
exec python -m mlomae quickstart --output "$output" "${data[@]}"
