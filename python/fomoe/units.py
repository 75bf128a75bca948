# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

__all__ = ["human_bytes", "human_count", "tick_bytes"]

_BYTES = ["B", "kB", "MB", "GB", "TB", "PB"]


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
