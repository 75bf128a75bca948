# SPDX-License-Identifier: Apache-2.0
# Sourced by the Makefile's scripts. Leaves `python` of the environment to use first on PATH:
# the active one when it has torch >= 2.11, otherwise .venv, which it makes when needed.
# Then `install_fomoe EXTRAS` builds and installs this checkout there.

say() { printf '\033[1m%s\033[0m\n' "$*"; }

has_torch() {
  "$1" -c 'import torch, sys
sys.exit(sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11))' 2>/dev/null
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: fomoe needs Python 3.11 or newer; none was found on PATH" >&2
  return 1
}

use_environment() {
  local base
  if command -v python >/dev/null && has_torch python; then
    say "Using the active environment ($(python -c 'import torch; print("torch", torch.__version__)'))."
    CONSTRAINTS=()
    return
  fi
  base=$(find_python) || return 1
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "Making the virtual environment .venv with $base."
    rm -rf .venv
    if ! "$base" -m venv .venv; then
      rm -rf .venv
      echo "error: $base cannot make a virtual environment (Debian: apt install python3-venv)" >&2
      return 1
    fi
  fi
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
  CONSTRAINTS=(-c constraints.txt)
  if ! has_torch python; then
    say "Installing $(grep '^torch==' constraints.txt) from your package index into .venv:"
    say "about 200 MB where the index serves a CPU build, up to 3 GB with the CUDA libraries that"
    say "Linux builds bring. To use a torch of your own instead, activate its environment first."
    python -m pip install --quiet --disable-pip-version-check ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} torch numpy
  fi
}

install_fomoe() {
  local extras=$1 cuda=$2
  python -m pip install --quiet --disable-pip-version-check ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} \
    "scikit-build-core>=1.0" "pybind11>=3" "cmake>=3.28" ninja
  say "Building and installing fomoe (FOMOE_CUDA=$cuda)."
  python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
    ${CONSTRAINTS[@]+"${CONSTRAINTS[@]}"} --config-settings=cmake.define.FOMOE_CUDA="$cuda" ".[$extras]"
}
