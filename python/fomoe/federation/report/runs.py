# SPDX-License-Identifier: Apache-2.0
"""What a report reads of a run folder: summary.json, metrics.jsonl and ledger.jsonl."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from fomoe.errors import UserError
from fomoe.federation.ledger import EXCHANGE_CLASSES

__all__ = ["Evaluation", "Run", "read_runs", "step_loss"]

_SUMMARY_KEYS = (
    "strategy",
    "sites",
    "overlap",
    "local_steps",
    "rounds",
    "seed",
    "commit",
    "corpus_sha256",
    "corpus_bytes",
    "token",
    "unigram_entropy",
    "bigram_entropy",
    "loss",
    "site_losses",
    "tokens_per_second",
    "ghost_share",
    "routing_findings",
    "bytes_per_site",
    "bytes_by_class",
    "memory_per_site",
    "parameters",
    "parameters_per_site",
    "seconds",
)
_METRIC_KEYS = {
    "step": ["step", "losses"],
    "round": ["round", "bytes_total", "routing"],
    "evaluation": ["round", "loss"],
    "warning": ["round", "sentence"],
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of the assembled model (nats per token), and where training stood: steps and bytes."""

    step: int
    bytes_total: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run. `label` is unique among the runs of a report.

    `round_losses` are the mean training losses over the steps and sites of each round;
    `ledger_bytes` adds up the ledger's lines by class.
    """

    folder: Path
    label: str
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    round_losses: list[float]
    evaluations: list[Evaluation]
    ledger_bytes: dict[str, int]

    @property
    def strategy(self) -> str:
        return str(self.summary["strategy"])

    @property
    def sites(self) -> int:
        return int(self.summary["sites"])

    @property
    def bytes_per_site(self) -> float:
        """Mean over sites of the bytes sent to other sites in the whole run."""
        return float(sum(self.summary["bytes_per_site"])) / self.sites

    @property
    def bytes_by_class(self) -> dict[str, float]:
        """The same by ledger class; without what goes to the coordinator."""
        by_class: dict[str, int] = self.summary["bytes_by_class"]
        return {name: by_class[name] / self.sites for name in EXCHANGE_CLASSES if name in by_class}

    @property
    def memory_by_class(self) -> list[dict[str, int]]:
        """Tensor bytes by class, one entry per site."""
        sites: list[dict[str, int]] = self.summary["memory_per_site"]
        return [{k: v for k, v in site.items() if not k.startswith("peak_")} for site in sites]

    @property
    def memory_per_site(self) -> float:
        """Tensor bytes, mean over sites."""
        return sum(sum(site.values()) for site in self.memory_by_class) / self.sites

    @property
    def peak_rss(self) -> int:
        """Largest resident set of a site's process, bytes."""
        return int(max(site["peak_rss"] for site in self.summary["memory_per_site"]))


def step_loss(step: Mapping[str, Any]) -> float:
    """Mean over the sites of a line of kind "step"; NaN if none had a finite one."""
    finite = [loss for loss in step["losses"] if loss is not None]
    return mean(finite) if finite else math.nan


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads finished runs, in the given order.

    Raises
    ------
    UserError
        None is given, or a file is missing, is no JSON or lacks a value; the file, line and key are
        named.
    """
    if not folders:
        raise UserError("a report needs at least one run folder, got none")
    summaries = [_read_summary(folder) for folder in folders]
    strategies = [summary["strategy"] for summary in summaries]
    runs = []
    for folder, summary in zip(folders, summaries, strict=True):
        alone = strategies.count(summary["strategy"]) == 1
        label = summary["strategy"] if alone else f"{summary['strategy']} ({folder.name})"
        runs.append(_read_run(folder, label, summary))
    return runs


def _read_summary(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"run folder {folder} does not exist")
    file = folder / "summary.json"
    try:
        summary = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    _require(summary, _SUMMARY_KEYS, str(file))
    return dict(summary)


def _read_run(folder: Path, label: str, summary: dict[str, Any]) -> Run:
    steps: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    round_losses: list[float] = []
    evaluations: list[Evaluation] = []
    first_of_round = 0
    for place, line in _json_lines(folder / "metrics.jsonl"):
        kind = line.get("kind")
        if kind not in _METRIC_KEYS:
            raise UserError(f"{place}: expected kind {', '.join(_METRIC_KEYS)}, got {kind!r}")
        _require(line, _METRIC_KEYS[kind], place)
        if kind == "step":
            steps.append(line)
        elif kind == "round":
            rounds.append(line)
            losses = [step_loss(step) for step in steps[first_of_round:]]
            finite = [loss for loss in losses if math.isfinite(loss)]
            round_losses.append(mean(finite) if finite else math.nan)
            first_of_round = len(steps)
        elif kind == "evaluation":  # it belongs to the state that the lines before it left behind
            evaluations.append(
                Evaluation(
                    step=steps[-1]["step"] + 1 if steps else 0,
                    bytes_total=rounds[-1]["bytes_total"] if rounds else 0,
                    loss=line["loss"],
                )
            )
    ledger_bytes: dict[str, int] = {}
    for place, line in _json_lines(folder / "ledger.jsonl"):
        _require(line, ["class", "bytes"], place)
        ledger_bytes[line["class"]] = ledger_bytes.get(line["class"], 0) + line["bytes"]
    return Run(
        folder=folder,
        label=label,
        summary=summary,
        steps=steps,
        rounds=rounds,
        round_losses=round_losses,
        evaluations=evaluations,
        ledger_bytes=ledger_bytes,
    )


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place for messages, object) per line."""
    for number, text in enumerate(_read(file).splitlines(), start=1):
        try:
            yield f"{file} line {number}", json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {number} is no JSON: {error}") from None


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: has the run finished?") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _require(values: object, keys: Sequence[str], place: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(values).__name__}")
    missing = [key for key in keys if key not in values]
    if missing:
        raise UserError(f"{place} has no {missing[0]!r}")
