# SPDX-License-Identifier: Apache-2.0
"""Routing health over the rounds, by layer and by site, as inline SVG text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fomoe.federation.health import MEASURES
from fomoe.federation.report.plot import Plot
from fomoe.federation.report.runs import Run
from fomoe.federation.report.style import color_of
from fomoe.federation.report.svg import (
    BASELINE,
    colormap,
    new_figure,
    shades,
    site_colors,
    style,
    to_svg,
    whole_numbers,
)

__all__ = ["routing_figures"]

_TITLES = {
    "load_entropy": "load entropy",
    "load_variation": "load variation",
    "dead_experts": "dead experts",
    "ghost_share": "ghost share",
}
_EVEN = {"load_entropy": 1.0, "load_variation": 0.0, "dead_experts": 0.0}
_EVEN_LINE = BASELINE | {"zorder": 4}
_MOST_MARKERS = 30
_MOST_LABELS = 6
_MARK = "#b45309"

_Limits = dict[str, tuple[float, float]]
_Values = npt.NDArray[np.float64]


def routing_figures(runs: Sequence[Run]) -> list[Plot]:
    """Router health of each run that recorded it, on the same scales."""
    recorded = [run for run in runs if run.rounds and run.rounds[-1]["routing"]]
    limits = _limits(recorded)
    with style():
        return [
            Plot(
                title=run.label,
                caption=_caption(run),
                svg=to_svg(_health(run, limits), f"routing-{index}")
                + to_svg(_load(run), f"load-{index}"),
            )
            for index, run in enumerate(recorded)
        ]


def _caption(run: Run) -> str:
    caption = (
        f"Overlap {run.summary['overlap']} of {run.sites} sites. Top, a line per layer: the mean "
        "over sites; dead are the experts that no site chose. Below, a line per site: the mean "
        "over layers, and in grey the range over all layers and sites. Dashed: an even router."
    )
    return caption + (
        " Crosses: findings, with their layer." if run.summary["routing_findings"] else ""
    )


def _health(run: Run, limits: _Limits) -> Figure:
    figure, panels = new_figure(8, columns=4, width=11.2, height=5.0)
    rounds = np.array([each["round"] for each in run.rounds])
    for (name, title), by_layer, by_site in zip(
        _TITLES.items(), panels[:4], panels[4:], strict=True
    ):
        by_layer.set_title(title)
        _layer_lines(by_layer, run, name, rounds)
        _site_lines(by_site, run, name, rounds)
        by_site.set_xlabel("round")
        for axes in (by_layer, by_site):
            axes.plot(rounds, _even(run, name), drawstyle="steps-mid", label="even", **_EVEN_LINE)
            axes.set_ylim(limits[name])
            whole_numbers(axes.xaxis)
            if name == "dead_experts":
                whole_numbers(axes.yaxis)
    panels[0].set_ylabel("layers")
    panels[4].set_ylabel("sites")
    for row in (panels[:4], panels[4:]):
        handles, labels = row[0].get_legend_handles_labels()
        row[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _layer_lines(axes: Axes, run: Run, name: str, rounds: _Values) -> None:
    values = _by_layer(run, name)
    layers = [layer["layer"] for layer in run.rounds[-1]["routing"]]
    for index, color in enumerate(shades(color_of(run), len(layers))):
        labelled = len(layers) <= _MOST_LABELS or index in (0, len(layers) - 1)
        label = f"layer {layers[index]}" if labelled else None
        axes.plot(rounds, values[:, index], color=color, label=label, **_line(rounds))
    first = int(rounds[0])
    for finding in run.summary["routing_findings"]:
        if MEASURES[finding["kind"]] == name:
            height = values[finding["round"] - first, finding["layer"]]
            axes.plot(finding["round"], height, "X", color=_MARK, markersize=6, zorder=5)
            axes.annotate(
                f"{finding['layer']}",
                (finding["round"], height),
                xytext=(5, 4),
                textcoords="offset points",
                color=_MARK,
                fontsize=8,
            )


def _site_lines(axes: Axes, run: Run, name: str, rounds: _Values) -> None:
    values = _by_layer_and_site(run, name)
    axes.fill_between(
        rounds,
        values.min(axis=(1, 2)),
        values.max(axis=(1, 2)),
        color="#e2e8f0",
        linewidth=0,
    )
    sites = values.shape[2]
    for site, color in enumerate(site_colors(sites)):
        labelled = sites <= 8 or site in (0, sites - 1)
        label = f"site {site}" if labelled else None
        mean = values[:, :, site].mean(axis=1)
        axes.plot(rounds, mean, color=color, label=label, **_line(rounds))


def _line(rounds: _Values) -> dict[str, Any]:
    few = len(rounds) <= _MOST_MARKERS
    return {"linewidth": 1.4, "marker": "o" if few else None, "markersize": 2.2}


def _by_layer(run: Run, name: str) -> _Values:
    """(rounds, layers)"""
    return np.array([[layer[name] for layer in each["routing"]] for each in run.rounds], float)


def _by_layer_and_site(run: Run, name: str) -> _Values:
    """(rounds, layers, sites)"""
    return np.array(
        [[layer["sites"][name] for layer in each["routing"]] for each in run.rounds], float
    )


def _even(run: Run, name: str) -> _Values:
    """What an even router would show, (rounds,)."""
    if name == "ghost_share":
        even: _Values = _by_layer(run, "even_ghost_share").mean(axis=1)
        return even
    return np.full(len(run.rounds), _EVEN[name])


def _limits(runs: Sequence[Run]) -> _Limits:
    """Scales that hold every layer and site of every run, and what is even."""
    limits = {}
    for name in _TITLES:
        values = [
            np.nan_to_num(numbers.ravel(), nan=_EVEN.get(name, 0.0))
            for run in runs
            for numbers in (_by_layer(run, name), _by_layer_and_site(run, name), _even(run, name))
        ]
        low, high = (
            (float(np.concatenate(values).min()), float(np.concatenate(values).max()))
            if values
            else (0.0, 1.0)
        )
        margin = 0.06 * (high - low) or 0.06
        limits[name] = (low - margin, high + margin)
    return limits


def _load(run: Run) -> Figure:
    """Load of every expert in the last round, 1 when all of a layer get the same."""
    layers = run.rounds[-1]["routing"]
    figure, (axes,) = new_figure(1, width=11.2, height=min(1.5 + 0.12 * len(layers), 4.0))
    load = np.array([layer["load"] for layer in layers], dtype=float)
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-30) * load.shape[1]
    image = axes.imshow(
        share,
        aspect="auto",
        cmap=colormap(color_of(run)),
        norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, float(share.max()))),
        interpolation="nearest",
    )
    axes.set(xlabel="expert", ylabel="layer", title="load of the last round (1 = even share)")
    axes.grid(visible=False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.ax.tick_params(length=0)
    return figure
