# SPDX-License-Identifier: Apache-2.0
"""What the terminal shows of the records."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fomoe.bench.baselines import OURS
from fomoe.bench.shapes import Shape

_PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def print_machine(
    console: Console, machine: Mapping[str, Any], versions: Mapping[str, Any]
) -> None:
    """One line on the machine, one on its ceilings."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine["gemm_gflops"].items())
    _say(
        console,
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} used, load average "
        f"{machine['load_average']:.1f}; torch {versions['torch']}, "
        f"transformers {versions['transformers'] or 'missing'}",
    )
    _say(
        console,
        f"Ceilings: torch.mm {rates} GFLOP/s, copy {machine['copy_gbytes_per_second']:.0f} GB/s "
        "read and written",
    )


def layer_table() -> Table:
    """The empty table of :func:`add_layer_row`; 80 columns are enough for it."""
    table = _table("T,D,F,E,K", "dtype", "pass")
    for name in ("ms", "fastest other", "ms", "ratio", "quartiles", "GEMM"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def add_layer_row(table: Table, records: Sequence[Mapping[str, Any]]) -> None:
    """A case: our time against the baseline we gain least on."""
    ours = next(record for record in records if record["contender"] == OURS)
    other = fastest_baseline(records)
    low, high = other["ratio_quartiles"]
    color = "green" if other["ratio"] >= 1 else "red"
    table.add_row(
        str(Shape(**ours["shape"])),
        ours["dtype"],
        _PASSES[ours["pass"]],
        _milliseconds(ours["median_ms"]),
        other["contender"],
        _milliseconds(other["median_ms"]),
        f"[{color}]{other['ratio']:.2f}x[/{color}]",
        f"{low:.2f}-{high:.2f}",
        f"{ours['gemm_share']:.0%}",
    )


def print_layer_legend(console: Console) -> None:
    _say(
        console,
        "ms: median. ratio: time of the fastest other over ours, median of the ratios of single\n"
        "repetitions, in which all run on the same new batch. GEMM: our rate of the experts'\n"
        "products over torch.mm's. torch: F.grouped_mm, index_select, index_add. Before timing,\n"
        "outputs and gradients agreed with a float64 reference.",
    )


def fastest_baseline(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the contender with the smallest ratio to ours."""
    others = [record for record in records if record["contender"] != OURS]
    return min(others, key=lambda record: float(record["ratio"]))


def _table(*left: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    return table


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
