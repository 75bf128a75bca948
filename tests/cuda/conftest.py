# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

for folder in ("ops", "cuda"):  # the tests share samples.py and op_calls.py with those of the ops
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
