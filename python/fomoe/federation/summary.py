# SPDX-License-Identifier: Apache-2.0
"""What a run adds up to: the numbers of metrics.jsonl's rounds and of summary.json."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fomoe._build import source_commit
from fomoe.federation.checkpoint import Totals
from fomoe.federation.config import Config
from fomoe.federation.health import Finding, RoutingHealth, summarize_routing
from fomoe.federation.ledger import EXCHANGE_CLASSES
from fomoe.federation.task import LanguageModelTask, Task

__all__ = ["RunTotals", "corpus_sha256", "versions"]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "fomoe": version("fomoe"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def corpus_sha256(task: Task) -> str | None:
    """SHA-256 (hex) of the data a task trains on; None for a task without any."""
    return task.data.sha256 if isinstance(task, LanguageModelTask) else None


class RunTotals:
    """Adds up the sites' reports, round by round.

    ``exchange_bytes`` of a site counts what it sent to other sites (shared, expert, tokens).
    ``new_findings`` is what the last round added to the routing's findings.
    """

    def __init__(self, config: Config, task: Task) -> None:
        self.config = config
        self.commit = source_commit()
        self.corpus = _describe_corpus(task)
        self.tokens = 0
        self.seconds = 0.0
        self.ghost_shares: list[float] = []
        self.routing_health = RoutingHealth()
        self.new_findings: list[Finding] = []
        self.exchange_bytes = [0] * config.federation.sites
        self.bytes_by_class: dict[str, int] = {}
        self.memory: list[dict[str, int]] = []
        self.parameters = 0
        self.parameters_per_site: list[int] = []
        self.loss: float | None = None
        self.site_losses: list[float] = []

    def state(self) -> Totals:
        """The sums so far, for the checkpoint's manifest."""
        return Totals(**{name: getattr(self, name) for name in Totals.model_fields})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of a resumed run."""
        for name, value in Totals.model_validate(state):
            setattr(self, name, value)
        # A site that has gone keeps what it sent.
        missing = self.config.federation.sites - len(self.exchange_bytes)
        self.exchange_bytes = self.exchange_bytes + [0] * missing

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sites per second of the slowest one, exchange included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def ghost_share(self) -> float:
        """Mean over rounds, sites and layers; 0 for a model without routing statistics."""
        return _mean(self.ghost_shares) if self.ghost_shares else 0.0

    def add_round(self, index: int, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Count a round's reports, one per site; return its line for metrics.jsonl."""
        seconds = max(report["seconds"] for report in reports)
        tokens = sum(report["tokens"] for report in reports)
        self.tokens += tokens
        self.seconds += seconds
        traffic: dict[str, int] = {}
        for site, report in enumerate(reports):
            for traffic_class, num_bytes in report["bytes"].items():
                traffic[traffic_class] = traffic.get(traffic_class, 0) + num_bytes
                if traffic_class in EXCHANGE_CLASSES:
                    self.exchange_bytes[site] += num_bytes
        for traffic_class, num_bytes in traffic.items():
            total = self.bytes_by_class.get(traffic_class, 0)
            self.bytes_by_class[traffic_class] = total + num_bytes
        by_site = [report["routing"] for report in reports]
        routing = summarize_routing(by_site)
        if routing:
            self.ghost_shares.append(_mean([layer["ghost_share"] for layer in routing]))
        self.new_findings = self.routing_health.observe(index, by_site)
        self.memory = [report["memory"] for report in reports]
        self.parameters = sum(report["owned_parameters"] for report in reports)
        self.parameters_per_site = [report["parameters"] for report in reports]
        return {
            "round": index,
            "tokens": self.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "exchange_seconds": max(report["exchange_seconds"] for report in reports),
            "ghost_share": self.ghost_shares[-1] if routing else 0.0,
            "bytes": traffic,
            "bytes_total": sum(self.exchange_bytes),
            "routing": routing,
        }

    def add_evaluation(self, loss: float, site_losses: list[float]) -> None:
        self.loss, self.site_losses = loss, site_losses

    def no_evaluation(self) -> None:
        """A checkpoint follows without one: the last result is of another state."""
        self.loss, self.site_losses = None, []

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        federation = self.config.federation
        return {
            "strategy": federation.strategy,
            "outer": None if federation.meets_every_step else federation.outer,
            "sites": federation.sites,
            "overlap": federation.overlap,
            "local_steps": federation.local_steps,
            "rounds": federation.rounds,
            "seed": self.config.training.seed,
            "commit": self.commit,
            "versions": versions(),
            **self.corpus,
            "loss": self.loss,
            "site_losses": self.site_losses,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "ghost_share": self.ghost_share,
            "routing_findings": [each.model_dump() for each in self.routing_health.findings],
            "bytes_per_site": self.exchange_bytes,
            "bytes_by_class": self.bytes_by_class,
            "memory_per_site": self.memory,
            "parameters": self.parameters,
            "parameters_per_site": self.parameters_per_site,
        }


def _describe_corpus(task: Task) -> dict[str, Any]:
    digest = {"corpus_sha256": corpus_sha256(task)}
    if not isinstance(task, LanguageModelTask):
        return digest
    facts = task.data.facts()
    return {
        **digest,
        "corpus_bytes": facts.num_bytes,
        "token": facts.unit,
        "unigram_entropy": facts.unigram_entropy,
        "bigram_entropy": facts.bigram_entropy,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
