# SPDX-License-Identifier: Apache-2.0
"""The words and numbers of a report: summary table, facts, findings, warnings."""

from collections.abc import Sequence
from typing import Any

from fomoe.federation.report.runs import Run
from fomoe.federation.report.style import color_of
from fomoe.units import human_bytes, human_count

__all__ = ["facts", "findings", "references", "row", "warnings"]

_SHARED_FACTS = {
    "corpus_sha256": "text",
    "token": "what a token is",
    "seed": "seed",
    "commit": "commit",
    "sites": "number of sites",
}


def row(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """One run's line of the summary table, as text by column."""
    summary = run.summary
    best = min(other.summary["loss"] for other in runs)
    skips = run.strategy == "fomoe"  # with ep, too, a site has some experts only
    ideal = 1 - summary["overlap"] / run.sites if skips else 0.0
    ghosts = f"{summary['ghost_share']:.1%}"
    return {
        "label": run.label,
        "color": color_of(run),
        "sites": run.sites,
        "overlap": summary["overlap"],
        "local_steps": summary["local_steps"],
        "loss": f"{summary['loss']:.3f}",
        "gap": "best" if summary["loss"] == best else f"+{summary['loss'] / best - 1:.1%}",
        "traffic": human_bytes(run.bytes_per_site),
        "parameters": human_count(max(summary["parameters_per_site"])),
        "memory": human_bytes(run.memory_per_site),
        "peak_rss": human_bytes(run.peak_rss),
        "tokens_per_second": human_count(summary["tokens_per_second"]),
        "ghosts": ghosts if ideal == 0 else f"{ghosts} (even: {ideal:.0%})",
        "seconds": f"{summary['seconds']:.{0 if summary['seconds'] > 10 else 1}f} s",
    }


def references(run: Run) -> list[tuple[str, str]]:
    """(name, loss) of what the text alone allows to a model without context or with one byte."""
    if run.summary["bigram_entropy"] is None:  # streams are not read to the end for it
        return []
    return [
        ("bigram entropy of the text", f"{run.summary['bigram_entropy']:.3f}"),
        ("unigram entropy of the text", f"{run.summary['unigram_entropy']:.3f}"),
    ]


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, value) of what the runs have in common."""
    first = runs[0].summary
    trained = sorted({f"{human_count(run.summary['parameters'])}" for run in runs})
    lengths = sorted({run.summary["rounds"] * run.summary["local_steps"] for run in runs})
    return [
        ("Model", f"{' / '.join(trained)} parameters"),
        ("Steps", " / ".join(f"{length:,}" for length in lengths)),
        ("Text", f"{human_bytes(first['corpus_bytes'])}, SHA-256 {first['corpus_sha256'][:12]}"),
        ("Seed", " / ".join(sorted({str(run.summary["seed"]) for run in runs}))),
        ("Commit", " / ".join(sorted({str(run.summary["commit"])[:12] for run in runs}))),
    ]


def findings(runs: Sequence[Run]) -> list[str]:
    """Sentences that compare the strategies; a pair is compared when each has exactly one run."""
    sentences = []
    by_strategy = {run.strategy: run for run in runs}
    if len(by_strategy) == len(runs):
        ddp, diloco, fomoe = (by_strategy.get(name) for name in ("ddp", "diloco", "fomoe"))
        if ddp and diloco and diloco.bytes_per_site:
            factor = ddp.bytes_per_site / diloco.bytes_per_site
            sentences.append(f"diloco sends {factor:.1f}x fewer bytes than ddp.")
        if diloco and fomoe and diloco.bytes_per_site:
            sentences.append(
                f"fomoe sends {_change(fomoe.bytes_per_site, diloco.bytes_per_site, 'fewer')} bytes"
                f" than diloco and keeps {_change(fomoe.memory_per_site, diloco.memory_per_site)} "
                f"tensor memory per site; its loss is "
                f"{_change(fomoe.summary['loss'], diloco.summary['loss'], 'lower', 'higher')}."
            )
    if any(run.summary["bigram_entropy"] is None for run in runs):
        return sentences
    above = [run.label for run in runs if run.summary["loss"] >= run.summary["bigram_entropy"]]
    if above:
        sentences.append(f"Not below the text's bigram entropy: {', '.join(above)}.")
    else:
        which = "Every run ends" if len(runs) > 1 else "The run ends"
        sentences.append(f"{which} below the text's bigram entropy.")
    return sentences


def warnings(runs: Sequence[Run]) -> list[str]:
    """Sentences about what makes the runs or their numbers doubtful."""
    found = [
        f"The runs differ in {name}: compare with care."
        for key, name in _SHARED_FACTS.items()
        if len({str(run.summary[key]) for run in runs}) > 1
    ]
    for run in runs:
        by_class: dict[str, int] = run.summary["bytes_by_class"]
        found += [
            f"{run.label}: the ledger's lines of class {name} add up to "
            f"{run.ledger_bytes.get(name, 0):,} bytes, the summary says {by_class.get(name, 0):,}."
            for name in sorted(by_class.keys() | run.ledger_bytes.keys())
            if run.ledger_bytes.get(name, 0) != by_class.get(name, 0)
        ]
        found += _routing_warnings(run)
    return found


def _routing_warnings(run: Run) -> list[str]:
    """A sentence per kind of finding: the first one's, and in how many layers there are more."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for finding in run.summary["routing_findings"]:
        by_kind.setdefault(finding["kind"], []).append(finding)
    sentences = []
    for first, *others in by_kind.values():
        layers = ", ".join(str(finding["layer"]) for finding in others)
        more = f" The same in layer {layers}." if len(others) == 1 else ""
        if len(others) > 1:
            more = f" The same in {len(others)} more layers: {layers}."
        sentences.append(f"{run.label}, round {first['round']}: {first['sentence']}.{more}")
    return sentences


def _change(value: float, base: float, less: str = "less", more: str = "more") -> str:
    share = value / base - 1
    return f"{abs(share):.1%} {less if share <= 0 else more}"
