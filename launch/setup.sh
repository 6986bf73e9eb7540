# shellcheck shell=bash
# Makes a bare Debian or Ubuntu machine ready: system libraries, .venv, pinned Python packages.
# Source it, then call `setup_machine`. Every run installs what is missing; when nothing is, it only
# checks (under a second). The full log is .venv/setup.log.
#
#   PYTHON=python3.12   the interpreter that .venv is made from (default python3)
#   MLOMAE_FLASH=1      also builds flash-attn, where there are a GPU and nvcc

MLOMAE_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
MLOMAE_VENV=$MLOMAE_ROOT/.venv
MLOMAE_LOG=$MLOMAE_VENV/setup.log
FASHION_MNIST=/usr/share/datasets/fashion-mnist

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# stage TITLE COMMAND...: one line for the reader, everything else into the log.
stage() {
  local title=$1 start=$SECONDS
  shift
  mkdir -p "$MLOMAE_VENV"
  printf 'setup: %s ... ' "$title"
  if ! "$@" >>"$MLOMAE_LOG" 2>&1 </dev/null; then
    printf 'failed\n'
    tail -n 30 "$MLOMAE_LOG" >&2
    fail "'$title' failed for the reason above (all of it is in $MLOMAE_LOG): fix it and run again"
  fi
  printf '%d s\n' $((SECONDS - start))
}

# The same, but a failure is a notice.
optional_stage() {
  local title=$1
  (stage "$@" 2>/dev/null) ||
    printf 'setup: going on without %s (the reason is in %s)\n' "$title" "$MLOMAE_LOG"
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# --- system packages -----------------------------------------------------------------------

# The interpreter of .venv once it runs, the one .venv will be made from before.
find_python() {
  if "$MLOMAE_VENV/bin/python" -c '' 2>/dev/null; then
    printf '%s' "$MLOMAE_VENV/bin/python"
  else
    printf '%s' "${PYTHON:-python3}"
  fi
}

check_python_version() {
  local python
  python=$(find_python)
  command -v "$python" >/dev/null || return 0 # apt brings it
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old: install Python 3.10 or newer and name it, as in PYTHON=python3.12 bash $0"
}

# Prints the Debian packages whose content is not here, however it might have been installed.
missing_packages() {
  local python
  python=$(find_python)
  "$python" -c '' 2>/dev/null || echo python3
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  "$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' \
    2>/dev/null || echo python3-dev
  command -v g++ >/dev/null || echo build-essential
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
}

is_root() { [ "$(id -u)" = 0 ]; }

can_install() { command -v apt-get >/dev/null && { is_root || sudo -n true 2>/dev/null; }; }

# The timeout waits for the updates that a fresh cloud machine runs by itself.
apt_get() {
  local command=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
  is_root || command=(sudo -n "${command[@]}")
  "${command[@]}" "$@"
}

apt_install() { apt_get update && apt_get install -y --no-install-recommends "$@"; }

install_system_packages() {
  command -v apt-get >/dev/null ||
    fail "there is no apt-get here: install what these Debian packages hold ($*) and run again"
  if ! can_install; then
    printf 'Some system packages are missing, and this user cannot install them. Run once:\n' >&2
    printf 'sudo apt-get update && sudo apt-get install -y %s\n' "$*" >&2
    exit 1
  fi
  stage "system packages ($*)" apt_install "$@"
  local missing
  mapfile -t missing < <(missing_packages)
  ((${#missing[@]} == 0)) ||
    fail "after installing, still no ${missing[*]} for $(find_python): install it and run again"
}

# Optional: some systems have no such package, and the quickstart then downloads the images.
install_dataset() { apt_install dataset-fashion-mnist || true; }

# --- Python packages -----------------------------------------------------------------------

# A .venv that was moved, or whose making or filling was cut short, is not sound.
venv_is_sound() {
  grep -qs "$MLOMAE_VENV/bin/python" "$MLOMAE_VENV/bin/pip" &&
    "$MLOMAE_VENV/bin/python" -I - <<'PY'
import sys
from importlib.metadata import distributions

files = [file for dist in distributions() for file in dist.files or [None]]
sys.exit(any(f is None or not (f.suffix == ".pyc" or f.locate().exists()) for f in files))
PY
}

pip_install() {
  "$MLOMAE_VENV/bin/python" -m pip install --no-input -c "$MLOMAE_ROOT/constraints.txt" "$@"
}

# DeepSpeed and FFCV come as sources and build against the torch and numpy in .venv, not against
# whatever an isolated build would fetch: hence the order, and --no-build-isolation.
install_python_packages() {
  [ -x "$MLOMAE_VENV/bin/pip" ] || stage "virtual environment" "${PYTHON:-python3}" -m venv "$MLOMAE_VENV"
  stage "build tools" pip_install setuptools wheel ninja packaging numpy py-cpuinfo
  stage "torch and torchvision" pip_install torch torchvision
  stage "DeepSpeed" pip_install --no-build-isolation deepspeed
  # Streams of .beton files do without it, so a machine where it does not build goes on.
  optional_stage "FFCV" pip_install --no-build-isolation ffcv
  stage "mlomae and the rest" pip_install --no-build-isolation -e "${MLOMAE_ROOT}[dev]"
  stage "check" "$MLOMAE_VENV/bin/python" -c 'import deepspeed, torch'
}

wants_flash() {
  [ "${MLOMAE_FLASH:-}" = 1 ] && command -v nvcc >/dev/null && has_gpu &&
    ! "$MLOMAE_VENV/bin/python" -c 'import flash_attn' 2>/dev/null
}

# --- the whole -----------------------------------------------------------------------------

# What .venv was made for; written last, so a set-up that was cut short is taken up again.
stamp_key() {
  (cd "$MLOMAE_ROOT" && cat setup.py constraints.txt launch/setup.sh <(pwd)) | sha256sum
}

stamp_is_current() { [ "$(cat "$MLOMAE_VENV/setup.stamp" 2>/dev/null)" = "$(stamp_key)" ]; }

setup_machine() {
  has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  check_python_version
  local missing
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]})) || ! stamp_is_current; then
    if [ -d "$MLOMAE_VENV" ] && ! venv_is_sound; then rm -rf "$MLOMAE_VENV"; fi
    if ((${#missing[@]})); then install_system_packages "${missing[@]}"; fi
    if [ ! -d "$FASHION_MNIST" ] && can_install; then stage "Fashion-MNIST" install_dataset; fi
    check_python_version
    install_python_packages
    stamp_key >"$MLOMAE_VENV/setup.stamp"
  fi
  if wants_flash; then stage "flash-attn" pip_install --no-build-isolation -e "${MLOMAE_ROOT}[flash]"; fi
  export VIRTUAL_ENV=$MLOMAE_VENV PATH=$MLOMAE_VENV/bin:$PATH
}
