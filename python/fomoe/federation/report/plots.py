# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, each as inline SVG text. Losses are nats per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fomoe.federation.report.runs import Run
from fomoe.federation.report.style import color_of
from fomoe.federation.report.svg import (
    BASELINE,
    class_colors,
    colormap,
    format_bytes_axis,
    new_figure,
    shades,
    style,
    to_svg,
    whole_numbers,
)
from fomoe.units import human_bytes

__all__ = ["Plot", "figures", "routing_figures"]

_LINE_STYLES = ("-", "--", ":", "-.")
_MAX_POINTS = 800


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure: heading, what it shows, and the SVG element."""

    title: str
    caption: str
    svg: str


def figures(runs: Sequence[Run]) -> list[Plot]:
    """Loss against steps and bytes, traffic and memory, for all runs together."""
    with style():
        return _figures(runs, _window(runs))


def routing_figures(runs: Sequence[Run]) -> list[Plot]:
    """Router health of each run that recorded it, on the same scales."""
    recorded = [run for run in runs if run.rounds and run.rounds[-1]["routing"]]
    layers = [layer for run in recorded for each in run.rounds for layer in each["routing"]]
    lowest = min((layer["load_entropy"] for layer in layers), default=0.0)
    highest = max((layer["load_variation"] for layer in layers), default=1.0)
    with style():
        return [
            Plot(
                title=run.label,
                caption=f"Overlap {run.summary['overlap']} of {run.sites} sites.",
                svg=to_svg(_routing(run, lowest, highest), f"routing-{index}"),
            )
            for index, run in enumerate(recorded)
        ]


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
        losses = np.array([np.mean(step["losses"]) for step in run.steps])
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


def _routing(run: Run, lowest: float, highest: float) -> Figure:
    figure, (entropy, variation, heat) = new_figure(3, columns=3, width=11.2, height=2.7)
    last = run.rounds[-1]["routing"]
    rounds = [each["round"] + 1 for each in run.rounds]
    colors = shades(color_of(run), len(last))
    for index, (layer, color) in enumerate(zip(last, colors, strict=True)):
        name = f"layer {layer['layer']}" if index in (0, len(last) - 1) or len(last) <= 6 else None
        for axes, key in ((entropy, "load_entropy"), (variation, "load_variation")):
            values = [each["routing"][index][key] for each in run.rounds]
            axes.plot(rounds, values, color=color, label=name, marker="o", markersize=2.5)
    entropy.set(title="load entropy (1 = even)", ylim=(lowest - 0.1 * (1 - lowest), 1.0))
    variation.set(title="load variation, std / mean (0 = even)", ylim=(0, 1.05 * highest or 1))
    entropy.legend(loc="best")
    for axes in (entropy, variation):
        axes.set_xlabel("round")
        whole_numbers(axes.xaxis)
    _heatmap(figure, heat, run)
    return figure


def _heatmap(figure: Figure, axes: Axes, run: Run) -> None:
    """Load of every expert in the last round, 1 when all of a layer get the same."""
    layers = run.rounds[-1]["routing"]
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
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.ax.tick_params(length=0)


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
