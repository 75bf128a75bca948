# SPDX-License-Identifier: Apache-2.0
"""Colours that table and plots share."""

from fomoe.federation.report.runs import Run

__all__ = ["color_of"]

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLORS = {"ddp": "#D55E00", "ep": "#CC79A7", "diloco": "#0072B2", "fomoe": "#009E73"}
_OTHER = "#64748b"


def color_of(run: Run) -> str:
    """The strategy's colour, as #RRGGBB."""
    return _COLORS.get(run.strategy, _OTHER)
