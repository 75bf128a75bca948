# SPDX-License-Identifier: Apache-2.0
"""``fomoe bench``: the layer against what else computes it, and what skipping ghosts saves."""

from fomoe.bench.run import run_layers, run_skip
from fomoe.bench.timing import Plan

__all__ = ["Plan", "run_layers", "run_skip"]
