# SPDX-License-Identifier: Apache-2.0
"""Matplotlib's look in a report, and figures as SVG text to put inside a page.

Uses Figure objects only, not pyplot: no global state, no window system.
"""

import io
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fomoe.units import tick_bytes

__all__ = [
    "BASELINE",
    "class_colors",
    "colormap",
    "format_bytes_axis",
    "new_figure",
    "shades",
    "site_colors",
    "style",
    "to_svg",
    "whole_numbers",
]

_INK, _MUTED, _GRID = "#0f172a", "#64748b", "#e2e8f0"
BASELINE: dict[str, Any] = {
    "color": _MUTED,
    "linestyle": (0, (4, 3)),
    "linewidth": 1.1,
    "zorder": 2,
}
"""Keyword arguments of a reference line."""

_STYLE: Any = {
    # Text stays text, in the fonts of the page: matplotlib measures with what it has.
    "svg.fonttype": "none",
    "svg.hashsalt": "fomoe",  # the same runs give the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": _MUTED,
    "axes.labelpad": 7,
    "axes.titlesize": 9.5,
    "axes.titlecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.3,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


# Tol's muted palette, which colour-blind readers tell apart; none is a strategy's.
_SITES = (
    "#332288",
    "#88ccee",
    "#117733",
    "#ddcc77",
    "#cc6677",
    "#44aa99",
    "#882255",
    "#999933",
)
_CLASSES = ("#27374d", "#5f7a99", "#a8bbcf", "#e6d9bd", "#c8a862", "#87692f")


def style() -> AbstractContextManager[None]:
    """Where figures are drawn and saved: `with style(): ...`."""
    return matplotlib.rc_context(_STYLE)


def new_figure(
    panels: int, *, columns: int = 1, width: float = 5.6, height: float = 3.7
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches with `panels` axes in `columns` columns."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(panels // columns, columns, squeeze=False)
    return figure, list(grid.flat)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose ids start with `name`, so that pages hold several."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return text.replace("'DejaVu Sans', sans-serif", "inherit")


def class_colors(bars: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """A colour per class, in order of first appearance; muted, unlike the strategies'."""
    names = list(dict.fromkeys(name for bar in bars for name in bar))
    return {name: _CLASSES[i % len(_CLASSES)] for i, name in enumerate(names)}


def shades(color: str, count: int) -> list[str]:
    """`count` colours from a light tint of `color` to a dark shade."""
    scale = LinearSegmentedColormap.from_list("shades", ["#ffffff", color, "#000000"])
    return [to_hex(scale(0.25 + 0.45 * i / max(1, count - 1))) for i in range(count)]


def site_colors(count: int) -> list[str]:
    """A colour per site; beyond eight they repeat."""
    return [_SITES[site % len(_SITES)] for site in range(count)]


def colormap(color: str) -> LinearSegmentedColormap:
    """White in the middle, grey below, `color` above."""
    return LinearSegmentedColormap.from_list("load", [_MUTED, "#ffffff", color])


def format_bytes_axis(axis: Axis) -> None:
    """Labels the ticks in kB, MB, ..."""
    axis.set_major_formatter(FuncFormatter(lambda size, _: tick_bytes(size)))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: Axis) -> None:
    """Puts ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))
