# SPDX-License-Identifier: Apache-2.0
"""The codes by which the ops know named choices: the enums of csrc/include/fomoe.

A str in a schema would leak its string on every call through torch's stable ABI.
"""

from collections.abc import Iterable, Mapping

GATE_SCORES = {"softmax": 0, "sigmoid": 1, "unit": 2}
GROUP_SCORES = {"max": 0, "top2_sum": 1}
ACTIVATIONS = {"swiglu": 0, "silu": 1, "swiglu_clamped": 2}


def alternatives(choices: Iterable[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def code_of(op: str, argument: str, name: str, codes: Mapping[str, int]) -> int:
    """The code of ``name``; a RuntimeError that names the argument if there is none."""
    if name not in codes:
        expected = alternatives(map(repr, codes))
        raise RuntimeError(f"fomoe::{op}: {argument} must be {expected}, got {name!r}")
    return codes[name]
