# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, each as inline SVG text. Losses are nats per token."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fomoe.federation.report.plot import Plot
from fomoe.federation.report.runs import Run, step_loss
from fomoe.federation.report.style import color_of
from fomoe.federation.report.svg import (
    BASELINE,
    class_colors,
    format_bytes_axis,
    new_figure,
    style,
    to_svg,
)
from fomoe.units import human_bytes

__all__ = ["figures"]

_LINE_STYLES = ("-", "--", ":", "-.")
_MAX_POINTS = 800


def figures(runs: Sequence[Run]) -> list[Plot]:
    """Loss against steps and bytes, traffic and memory, for all runs together."""
    with style():
        return _figures(runs, _window(runs))


def _figures(runs: Sequence[Run], window: int) -> list[Plot]:
    return [
        Plot(
            title="Loss against steps",
            caption=f"Bold: training loss, mean over sites, running mean of length {window}. "
            "Dots: validation loss of the assembled model, no expert skipped.",
            svg=to_svg(_loss_by_step(runs, window), "loss-steps"),
        ),
        Plot(
            title="Loss against traffic",
            caption="Training loss of each round over what a site has sent to others until then. "
            "Dots: validation loss of the assembled model.",
            svg=to_svg(_loss_by_bytes(runs), "loss-bytes"),
        ),
        Plot(
            title="Traffic",
            caption="Bytes a site sends to other sites in the whole run, by ledger class.",
            svg=to_svg(_traffic(runs), "traffic"),
        ),
        Plot(
            title="Memory",
            caption="Tensor bytes by class, one bar per site.",
            svg=to_svg(_memory(runs), "memory"),
        ),
    ]


def _loss_by_step(runs: Sequence[Run], window: int) -> Figure:
    figure, (axes,) = new_figure(1)
    for run, line_style in zip(runs, _styles(runs), strict=True):
        losses = np.array([step_loss(step) for step in run.steps])
        if len(losses):
            steps = np.array([step["step"] + 1 for step in run.steps])
            mean = _running_mean(losses, window)
            every = max(1, len(losses) // _MAX_POINTS)
            color = color_of(run)
            axes.plot(steps[::every], losses[::every], color=color, alpha=0.18, linewidth=0.8)
            axes.plot(
                steps[::every], mean[::every], line_style, color=color, label=run.label, zorder=3
            )
        _dots(axes, run, [(each.step, each.loss) for each in run.evaluations])
    _baseline(axes, runs)
    axes.set(xlabel="optimizer steps", ylabel=_loss_label(runs), xlim=(0, None))
    axes.legend()
    return figure


def _loss_by_bytes(runs: Sequence[Run]) -> Figure:
    figure, (axes,) = new_figure(1)
    for run, line_style in zip(runs, _styles(runs), strict=True):
        points = [
            (each["bytes_total"] / run.sites, loss)
            for each, loss in zip(run.rounds, run.round_losses, strict=True)
            if each["bytes_total"]
        ]
        if points:
            sent, losses = zip(*points, strict=True)
            axes.plot(sent, losses, line_style, color=color_of(run), label=run.label, zorder=3)
        validation = [(each.bytes_total / run.sites, each.loss) for each in run.evaluations]
        _dots(axes, run, [point for point in validation if point[0]])
    _baseline(axes, runs)
    if axes.get_legend_handles_labels()[0]:
        axes.set_xscale("log")
        axes.legend()
    format_bytes_axis(axes.xaxis)
    axes.set(xlabel="bytes sent per site (log scale)", ylabel=_loss_label(runs))
    return figure


def _traffic(runs: Sequence[Run]) -> Figure:
    """All bars on one scale; when one dwarfs the rest, again on the scale of the others."""
    totals = sorted(run.bytes_per_site for run in runs)
    zoomed = len(totals) > 1 and totals[-1] > 4 * totals[-2] > 0
    figure, panels = new_figure(2 if zoomed else 1)
    limits = [totals[-1], totals[-2]] if zoomed else [totals[-1]]
    bars = [run.bytes_by_class for run in runs]
    colors = class_colors(bars)
    for axes, limit in zip(panels, limits, strict=True):
        for position, classes in enumerate(bars):
            left = 0.0
            for name, size in classes.items():
                axes.barh(position, size, left=left, color=colors[name], height=0.62, linewidth=0)
                left += size
            inside = left <= limit
            axes.annotate(
                human_bytes(left) if inside else f"{human_bytes(left)} \u2192",
                (left if inside else limit * 1.2, position),
                xytext=(5 if inside else -5, 0),
                textcoords="offset points",
                va="center",
                ha="left" if inside else "right",
                color="black" if inside else "white",
            )
        axes.set_xlim(0, limit * 1.2 or 1)
        _run_ticks(axes, runs)
        format_bytes_axis(axes.xaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("bytes sent per site" + (" (below: zoomed in)" if zoomed else ""))
    _class_legend(figure, colors)
    return figure


def _memory(runs: Sequence[Run]) -> Figure:
    figure, (axes,) = new_figure(1)
    colors = class_colors([site for run in runs for site in run.memory_by_class])
    start, centers = 0.0, []
    for run in runs:
        positions = start + np.arange(run.sites)
        bottom = np.zeros(run.sites)
        for name, color in colors.items():
            sizes = np.array([site.get(name, 0) for site in run.memory_by_class], dtype=float)
            axes.bar(positions, sizes, bottom=bottom, color=color, width=0.82, linewidth=0)
            bottom += sizes
        centers.append(float(positions.mean()))
        axes.annotate(
            human_bytes(bottom.mean()),
            (centers[-1], bottom.max()),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
        start += run.sites + 1
    axes.set_xticks(centers, [run.label for run in runs])
    for tick, run in zip(axes.get_xticklabels(), runs, strict=True):
        tick.set(color=color_of(run), fontweight="bold")
    axes.tick_params(axis="x", length=0)
    format_bytes_axis(axes.yaxis)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("tensor bytes per site")
    axes.margins(y=0.12)
    _class_legend(figure, colors)
    return figure


def _dots(axes: Axes, run: Run, points: Sequence[tuple[float, float]]) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o", color=color_of(run), markeredgecolor="white", markersize=7, zorder=4)


def _baseline(axes: Axes, runs: Sequence[Run]) -> None:
    bigram_entropy = runs[0].summary["bigram_entropy"]
    if bigram_entropy is not None:
        axes.axhline(bigram_entropy, label="bigram entropy", **BASELINE)


def _loss_label(runs: Sequence[Run]) -> str:
    return f"loss (nats per {runs[0].summary['token']})"


def _run_ticks(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for tick, run in zip(axes.get_yticklabels(), runs, strict=True):
        tick.set(color=color_of(run), fontweight="bold")


def _class_legend(figure: Figure, colors: dict[str, str]) -> None:
    patches = [Patch(color=c, label=name.replace("_", " ")) for name, c in colors.items()]
    columns = len(patches) if len(patches) <= 4 else 3
    if patches:
        figure.legend(handles=patches, loc="outside upper left", ncols=columns)


def _styles(runs: Sequence[Run]) -> list[str]:
    """A solid line for the first run of each strategy, other patterns for the next ones."""
    strategies = [run.strategy for run in runs]
    return [
        _LINE_STYLES[strategies[:index].count(name) % len(_LINE_STYLES)]
        for index, name in enumerate(strategies)
    ]


def _window(runs: Sequence[Run]) -> int:
    return max(1, max(len(run.steps) for run in runs) // 40)


def _running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Mean of up to `window` values that end at each position, (n,) -> (n,)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    mean: npt.NDArray[np.float64] = (total[end] - total[start]) / (end - start)
    return mean
