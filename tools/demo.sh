#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make demo`: from nothing to a trained federation.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

use_environment
cuda=OFF
if nvidia-smi -L >/dev/null 2>&1; then cuda=AUTO; fi
install_fomoe report "$cuda"
exec python -m fomoe demo --folder runs/demo
