# SPDX-License-Identifier: Apache-2.0
"""Colours and number formats that table and plots share."""

from fomoe.federation.report.runs import Run

__all__ = ["color_of", "human_bytes", "human_count", "tick_bytes"]

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLORS = {"ddp": "#D55E00", "diloco": "#0072B2", "fomoe": "#009E73"}
_OTHER = "#CC79A7"
_BYTES = ["B", "kB", "MB", "GB", "TB", "PB"]


def color_of(run: Run) -> str:
    """The strategy's colour, as #RRGGBB."""
    return _COLORS.get(run.strategy, _OTHER)


def human_bytes(size: float) -> str:
    """Decimal units and three digits: 12345678 -> '12.3 MB'."""
    return _scaled(size, _BYTES)


def human_count(number: float) -> str:
    """Decimal units and three digits: 12345678 -> '12.3 M'."""
    return _scaled(number, ["", "k", "M", "G", "T", "P"])


def tick_bytes(size: float) -> str:
    """As short as an axis needs: 20000000 -> '20 MB'."""
    unit = 0
    while size >= 1000 and unit < len(_BYTES) - 1:
        size /= 1000
        unit += 1
    return f"{size:g} {_BYTES[unit]}" if size else "0"


def _scaled(value: float, units: list[str]) -> str:
    unit = 0
    while value >= 999.5 and unit < len(units) - 1:
        value /= 1000
        unit += 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[unit]}".strip()
