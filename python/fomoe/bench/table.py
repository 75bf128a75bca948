# SPDX-License-Identifier: Apache-2.0
"""What the terminal shows of the records; 80 columns are enough for all of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fomoe.bench.baselines import OURS
from fomoe.bench.shapes import Shape

Record = Mapping[str, Any]

_PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}
# Of issue and design: skipping half of the experts is to save at least 40% of the expert part.
_WANTED_COST_AT_HALF = 0.60


def say(console: Console, text: str) -> None:
    """Plain text: nothing in it is a colour, a tag or a place to wrap."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_machine(console: Console, about: Record) -> None:
    """One line on the machine, one on its ceilings."""
    machine, versions = about["machine"], about["versions"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine["gemm_gflops"].items())
    if gpu := machine["gpu"]:
        say(console, f"{gpu['name']}, compute capability {gpu['compute_capability']}")
    say(
        console,
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, load "
        f"{machine['load_average']:.1f}; torch {versions['torch']}, "
        f"transformers {versions['transformers'] or 'missing'}\n"
        f"Ceilings: torch.mm {rates} GFLOP/s, copy {machine['copy_gbytes_per_second']:.0f} GB/s "
        "(read and written)\n",
    )


def print_layers(console: Console, cases: Sequence[Sequence[Record]]) -> None:
    """A row for each case: our time against the baseline we gain least on."""
    table = _table("T,D,F,E,K", "dtype", "pass")
    for name in ("ms", "fastest other", "ms", "ratio", "quartiles", "GEMM"):
        table.add_column(name, justify="right", no_wrap=True)
    for records in cases:
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
    console.print(table)
    say(
        console,
        "ms: median. ratio: time of the fastest other over ours within a repetition, in\n"
        "which all run on the same new tokens; median and quartiles. GEMM: rate of our\n"
        "experts' products over torch.mm's. torch: F.grouped_mm, index_select, index_add.\n"
        "Before the timing, outputs and gradients of all agreed with float64; worst error:\n"
        f"{_worst_errors(cases)}.",
    )
    for name, why in cases[0][0]["missing"].items():
        say(console, f"Without {name}: {why}.")
    for records in cases:
        kept = {r["contender"]: r["activation_mib"] for r in records if "activation_mib" in r}
        if kept:
            ours, least = kept.pop(OURS), min(kept, key=lambda name: kept[name])
            shape = Shape(**records[0]["shape"])
            say(console, f"MiB kept, {shape}: {ours:.0f}; least other: {least} {kept[least]:.0f}")


def fastest_baseline(records: Sequence[Record]) -> Record:
    """The record of the contender with the smallest ratio to ours."""
    others = [record for record in records if record["contender"] != OURS]
    return min(others, key=lambda record: float(record["ratio"]))


def print_skipping(console: Console, groups: Sequence[Sequence[Record]]) -> None:
    """A table for each model, a row for each share of ghosts."""
    models: dict[str, dict[str, Sequence[Record]]] = {}
    for records in groups:
        models.setdefault(records[0]["model"], {})[records[0]["part"]] = records
    for name, parts in models.items():
        say(
            console,
            f"{name}: experts are {parts['layer'][0]['expert_flop_share']:.1%} of the layer's and "
            f"{parts['step'][0]['expert_flop_share']:.1%} of a step's FLOPs",
        )
        console.print(_skip_table(parts))
        half = next((r for r in parts["experts"] if r["wanted_ghost_share"] == 0.5), None)
        if half:
            low, high = half["cost_quartiles"]
            say(
                console,
                f"Expert part at 50% ghosts: {half['cost']:.2f} ({low:.2f}-{high:.2f}) of its time "
                f"without; wanted: at most {_WANTED_COST_AT_HALF:.2f}\n",
            )
    say(
        console,
        "experts: time of route and expert_mlp over that without ghosts. layer, step: how\n"
        "many times faster than without ghosts, and how many times faster if time were\n"
        "FLOPs, at the ghosts measured. Forward and backward, step with AdamW; bfloat16\n"
        "autocast, float32 weights. A step can beat its bound: ghosts need no optimizer.",
    )


def _skip_table(parts: Mapping[str, Sequence[Record]]) -> Table:
    table = _table()
    for name in (
        "\nghosts",
        "\nexperts",
        "layer\ntokens/s",
        "\nfaster",
        "FLOP\nbound",
        "step\ntokens/s",
        "\nfaster",
        "FLOP\nbound",
        "ghosts\nmeasured",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for experts, layer, step in zip(*(parts[p] for p in ("experts", "layer", "step")), strict=True):
        table.add_row(
            f"{step['wanted_ghost_share']:.0%}",
            f"{experts['cost']:.2f}",
            *_speed(layer),
            *_speed(step),
            f"{step['ghost_share']:.1%}",
        )
    return table


def _speed(record: Record) -> tuple[str, str, str]:
    bound = record["ideal_speedup"]
    return (
        f"{record['tokens_per_second']:,.0f}",
        f"{1 / record['cost']:.2f}x",
        f"{bound:.2f}x" if bound else "-",
    )


def _worst_errors(cases: Sequence[Sequence[Record]]) -> str:
    """Of outputs and gradients together, by dtype."""
    worst: dict[str, float] = {}
    for record in (record for records in cases for record in records):
        error = max(record["agreement"]["output"], record["agreement"]["gradient"])
        worst[record["dtype"]] = max(worst.get(record["dtype"], 0.0), error)
    return ", ".join(f"{dtype} {error:.0e}" for dtype, error in worst.items())


def _table(*left: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    return table


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
