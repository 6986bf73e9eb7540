#!/usr/bin/env bash
# Lint, types and tests, on a bare machine too: bash launch/test.sh [arguments of pytest]
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
setup_machine
# tests/multinode/ makes two hosts of these. An sshd that comes with them must not start by itself,
# hence only where no systemd runs, as in a container; elsewhere the tests say what is missing.
if is_root && can_install && [ ! -d /run/systemd/system ] &&
  ! hash ip ssh sshd pdsh pgrep 2>/dev/null; then
  optional_stage "tools of the tests on two hosts" \
    apt_install iproute2 openssh-client openssh-server pdsh procps
fi
cd -- "$MLOMAE_ROOT"

ruff check
ruff format --check
mypy
codespell
# Two files at a time: most tests wait for small processes. `-n 0`, given last, is one at a time.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n 2 --dist loadfile "$@"
