#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One model, three strategies, equal tokens: the runs of docs/results/first-federation.md.
#   bench/studies/first_federation.sh FOLDER [SECTION.KEY=VALUE]...
set -euo pipefail
folder=${1:?the folder for the runs and the report}
shift
for strategy in fomoe diloco ddp; do
  sites=$([[ $strategy = fomoe ]] && echo 2 || echo 4)
  fomoe train --config "$(dirname "$0")/first_federation.toml" federation.strategy="$strategy" \
    federation.overlap="$sites" run.folder="$folder/$strategy" "$@"
done
fomoe report "$folder"/fomoe "$folder"/diloco "$folder"/ddp --output "$folder/report.html"
