# SPDX-License-Identifier: Apache-2.0
"""Rounds of the demo's model on four sites: memory of a site, and share of the exchange.

Bytes of every class on every site have to be within 5% of the closed form; the paper's 18 bytes per
parameter are beside it. The exchange's share is that of the time in collectives, at the slowest
site, waiting for others included.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fomoe.demo
from fomoe.bench.machine import versions
from fomoe.federation.config import Config, load_config
from fomoe.federation.launch import train
from fomoe.federation.memory_model import paper_bytes, site_memory
from fomoe.federation.placement import placement_of_round
from fomoe.federation.task import LanguageModelTask

_EVERYWHERE = "federation.overlap=4"
RUNS = {
    "fomoe": [],
    "fomoe nesterov": ["federation.outer=nesterov"],
    "fomoe int8": ["federation.codec=int8"],
    "fomoe local_adamw": ["federation.outer=local_adamw"],
    "diloco": ["federation.strategy=diloco", _EVERYWHERE],
    "ddp": ["federation.strategy=ddp", _EVERYWHERE],
}
_TOLERANCE = 0.05


def run(name: str, overrides: Sequence[str], folder: Path) -> tuple[Config, dict[str, Any]]:
    path = Path(fomoe.demo.__file__).with_name("demo.toml")
    settings = ["training.threads=1", f"run.folder={folder / name.replace(' ', '-')}"]
    config = load_config(path, [*RUNS[name], *settings, *overrides])
    return config, train(config)


def compare(name: str, config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    task = LanguageModelTask(config)
    model, federation = task.model_config, config.federation
    last = federation.rounds - 1
    placement = placement_of_round(config, task.num_layers, task.num_experts, last)
    sites = []
    for site, measured in enumerate(summary["memory_per_site"]):
        expected = site_memory(model, federation, placement, site, config.optimizer.name)
        sites.append(
            {
                "measured": {key: measured[key] for key in expected},
                "expected": expected,
                "paper": paper_bytes(model, placement, site),
                "peak_rss": measured["peak_rss"],
            }
        )
    worst = max(
        abs(s["measured"][key] / value - 1) if value else float(s["measured"][key] > 0)
        for s in sites
        for key, value in s["expected"].items()
    )
    return {"run": name, "sites": sites, "worst_error": worst}


def rounds_of(config: Config) -> dict[str, Any]:
    path = Path(config.run.folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"][1:]  # the first one warms up
    shares = [line["exchange_seconds"] / line["seconds"] for line in rounds]
    return {
        "rounds": len(rounds),
        "seconds_per_round": statistics.median(line["seconds"] for line in rounds),
        "exchange_share": statistics.median(shares),
        "exchange_share_range": [min(shares), max(shares)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="of the demo's 10 local steps")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    results = []
    print(f"{'':<20}{'measured':>10}{'formula':>10}{'worst':>8}{'paper':>10}{'exchange':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            overrides = ["evaluation.every=0", f"federation.rounds={arguments.rounds}"]
            config, summary = run(name, overrides, Path(folder))
            result = compare(name, config, summary) | rounds_of(config)
            results.append(result)
            first = result["sites"][0]
            measured, expected = (
                sum(first[kind].values()) / 2**20 for kind in ("measured", "expected")
            )
            print(
                f"{name:<20}{measured:6.2f} MiB{expected:6.2f} MiB{result['worst_error']:8.2%}"
                f"{first['paper'] / 2**20:6.2f} MiB{result['exchange_share']:10.1%}",
                flush=True,
            )
    if arguments.output:
        about = {"benchmark": "federation_memory", "versions": versions()}
        arguments.output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if max(result["worst_error"] for result in results) > _TOLERANCE:
        raise SystemExit(f"a class of memory is more than {_TOLERANCE:.0%} off the closed form")


if __name__ == "__main__":
    main()
