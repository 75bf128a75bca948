# SPDX-License-Identifier: Apache-2.0
"""``fomoe demo``: the strategies from the same weights and data, side by side."""

import json
import shutil
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fomoe.demo.verdict import tensor_bytes_per_site, verdicts
from fomoe.errors import UserError
from fomoe.federation.config import Config, load_config
from fomoe.federation.launch import train
from fomoe.files import write_text
from fomoe.units import human_bytes, human_count

__all__ = ["STRATEGIES", "run"]

STRATEGIES = ("ddp", "ep", "diloco", "fomoe")
_MARKER = ".fomoe-demo"


def run(*, folder: Path, seed: int = 0, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train with every strategy, print one table, write ``summary.json`` and ``report.html``.

    ``overrides`` are settings that win over the demo's, as ``section.key=value``. Returns the
    content of ``summary.json``.

    Raises
    ------
    UserError
        When ``folder`` holds anything but an earlier demo, which is replaced.
    """
    _clear(folder)
    begin = time.perf_counter()
    runs = {
        strategy: train(_config(strategy, folder / strategy, seed, overrides))
        for strategy in STRATEGIES
    }
    result: dict[str, Any] = {
        "seed": seed,
        "commit": runs["fomoe"]["commit"],
        "corpus_sha256": runs["fomoe"]["corpus_sha256"],
        "bigram_entropy": runs["fomoe"]["bigram_entropy"],
        "seconds": time.perf_counter() - begin,
        "verdicts": verdicts(runs),
        "strategies": runs,
    }
    write_text(folder / "summary.json", json.dumps(result, indent=1) + "\n")
    console = Console()
    _print(console, result)
    _report(console, folder)
    console.print(f"Numbers: {folder}/summary.json")
    return result


def _config(strategy: str, folder: Path, seed: int, more: Sequence[str]) -> Config:
    overrides = [
        *more,
        f"federation.strategy={strategy}",
        f"run.folder={json.dumps(str(folder))}",
        f"training.seed={seed}",
    ]
    with as_file(files(__name__) / "demo.toml") as path:
        if strategy != "fomoe":  # ep holds an expert on one site, the others on every one
            sites = load_config(path, more).federation.sites
            overrides.append(f"federation.overlap={1 if strategy == 'ep' else sites}")
        return load_config(path, overrides)


def _clear(folder: Path) -> None:
    """Make ``folder`` an empty one that is marked as a demo's; only such a one is ever emptied."""
    try:
        if (folder / _MARKER).is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no earlier demo: choose another")
        write_text(folder / _MARKER, "Written by fomoe demo, which may delete this folder.\n")
    except OSError as error:
        raise UserError(f"cannot use {folder} for the demo: {error.strerror}") from error


def _print(console: Console, result: dict[str, Any]) -> None:
    runs = result["strategies"]
    any_run = runs["fomoe"]
    parameters = human_count(any_run["parameters"])
    table = Table(
        title=f"One MoE of {parameters} parameters over {any_run['sites']} sites",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("strategy", no_wrap=True)
    for name in (
        "\nloss",
        "sent\nper site",
        "less\nthan ddp",
        "weights\nper site",
        "tensors\nper site",
        "peak\nRSS",
        "tokens\nper s",
        "\nghosts",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    ddp_bytes = fmean(runs["ddp"]["bytes_per_site"])
    for strategy, summary in runs.items():
        sent = fmean(summary["bytes_per_site"])
        memory = summary["memory_per_site"]
        table.add_row(
            strategy,
            f"{summary['loss']:.3f}",
            human_bytes(sent),
            f"{ddp_bytes / sent:.1f}x",
            human_count(max(summary["parameters_per_site"])),
            human_bytes(tensor_bytes_per_site(summary)),
            human_bytes(max(site["peak_rss"] for site in memory)),
            f"{summary['tokens_per_second']:,.0f}",
            f"{summary['ghost_share']:.0%}",
        )
    console.print(table)
    console.print(
        f"loss: of the assembled model, nats per byte of validation text; the text's bigram "
        f"entropy is {result['bigram_entropy']:.3f}.\n"
        "sent: to other sites, whole run, mean. tensors: weights, gradients, optimizer, exchange. "
        "RSS: the process with its libraries.\n"
        f"text: {human_bytes(any_run['corpus_bytes'])}, SHA-256 {result['corpus_sha256'][:12]}; "
        f"seed {result['seed']}; commit {result['commit'][:12]}; "
        f"{result['seconds']:.0f} s in all.\n",
        highlight=False,
        soft_wrap=True,
    )
    for verdict in result["verdicts"]:
        mark = "[green]yes[/green]" if verdict["holds"] else "[red]NO [/red]"
        console.print(f"{mark}  {verdict['claim']}", highlight=False, soft_wrap=True)


def _report(console: Console, folder: Path) -> None:
    from fomoe.federation.report import write_report

    try:
        write_report([folder / strategy for strategy in STRATEGIES], folder / "report.html")
    except UserError as error:  # the plots need an extra, the numbers do not
        console.print(f"No report: {error}")
    else:
        console.print(f"Plots:   {folder}/report.html")
