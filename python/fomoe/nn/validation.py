# SPDX-License-Identifier: Apache-2.0
"""Checks of settings; each message names the field, what was expected and what came."""

import math
from collections.abc import Sequence
from numbers import Integral


def require_integers(config: object, names: Sequence[str], *, at_least: int) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ValueError(f"{name}: expected an integer of at least {at_least}, got {value!r}")


def require_choice(config: object, name: str, choices: Sequence[str]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def require_numbers(config: object, names: Sequence[str], *, above: float | None = None) -> None:
    """Finite numbers: greater than ``above``, or at least 0 if that is None."""
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if above is None:
            valid, expected = is_number and 0 <= value < math.inf, "of at least 0"
        else:
            valid, expected = is_number and above < value < math.inf, f"above {above:g}"
        if not valid:
            raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")


def require_booleans(config: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")


def require_resident_experts(resident_experts: Sequence[int], num_experts: int) -> None:
    """Ascending ids below ``num_experts``, each at most once."""
    previous = -1
    for position, expert in enumerate(resident_experts):
        if not isinstance(expert, Integral) or not 0 <= expert < num_experts:
            expected = f"an id in [0, {num_experts})"
            raise ValueError(f"resident_experts[{position}]: expected {expected}, got {expert!r}")
        if expert <= previous:
            raise ValueError(
                f"resident_experts[{position}]: expected ascending ids without repetition, "
                f"got {expert} after {previous}"
            )
        previous = expert
