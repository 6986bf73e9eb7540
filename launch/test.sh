#!/usr/bin/env bash
# Lint, types and tests, on a bare machine too: bash launch/test.sh [arguments of pytest]
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
setup_machine
cd -- "$MLOMAE_ROOT"

ruff check
ruff format --check
mypy
# Two files at a time: most tests wait for small processes. `-n 0`, given last, is one at a time.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n 2 --dist loadfile "$@"
