# SPDX-License-Identifier: Apache-2.0
"""How to average the rows of a full router, and whether to scale the steps of experts.

Where an expert is a ghost, its row of the router gets no gradient from the loss, and FoMoE
(arXiv 2606.19025) leaves open what that means for the mean of the rows. This study trains one small
model with every rule, at the learning rates given, over the seeds given, and writes one JSON line
per run; `router_rows.py table RESULTS` prints the table of docs/results/router_rows.md.

    python bench/studies/router_rows.py run --overlap 1 --results bench/results/router_rows.jsonl
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

RULES = {
    "mean over all": {"router_mean": "all", "scale_expert_steps": False},
    "mean over holders": {"router_mean": "holders", "scale_expert_steps": False},
    "rescaled by M/O_e": {"router_mean": "rescaled", "scale_expert_steps": False},
    "all, sqrt-holder steps": {"router_mean": "all", "scale_expert_steps": True},
    "holders, sqrt-holder steps": {"router_mean": "holders", "scale_expert_steps": True},
}
MODEL = {
    "dim": 128, "num_layers": 3, "num_heads": 4, "expert_dim": 64, "num_experts": 16, "top_k": 4,
    "activation": "silu", "score": "sigmoid", "norm": "peri",
}  # fmt: skip
SITES = 4


def settings(rule: str, learning_rate: float, seed: int, overlap: int, folder: str) -> dict:
    strategy = {"strategy": "diloco"} if rule == "diloco" else {
        "strategy": "fomoe", "overlap": overlap, **RULES[rule]
    }  # fmt: skip
    return {
        "model": MODEL,
        "federation": {"sites": SITES, "local_steps": 16, "rounds": 12, **strategy},
        "optimizer": {"lr": learning_rate, "warmup_steps": 32},
        "training": {"batch_size": 8, "sequence_length": 128, "seed": seed, "threads": 1},
        "data": {"max_bytes": 8_000_000, "validation_sequences": 256},
        "evaluation": {"batch_size": 64},
        "run": {"folder": folder, "save": False},
    }


def run(arguments: argparse.Namespace) -> None:
    from fomoe.federation.config import Config
    from fomoe.federation.launch import train

    done = {key(line) for line in read(arguments.results)} if arguments.results.exists() else set()
    for seed, rule, learning_rate in itertools.product(
        arguments.seeds, [*RULES, "diloco"], arguments.learning_rates
    ):
        line = {
            "rule": rule, "learning_rate": learning_rate, "seed": seed,
            "overlap": SITES if rule == "diloco" else arguments.overlap,
        }  # fmt: skip
        if key(line) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            config = settings(rule, learning_rate, seed, arguments.overlap, f"{folder}/run")
            summary = train(Config.from_dict(config))
            line |= {
                "loss": summary["loss"], "ghost_share": summary["ghost_share"],
                "commit": summary["commit"], "tokens": summary["tokens"],
                "corpus_sha256": summary["corpus_sha256"],
                "seconds": round(time.perf_counter() - begin, 1),
                "round_losses": round_losses(Path(folder, "run", "metrics.jsonl")),
            }  # fmt: skip
        print(f"{rule:28} lr {learning_rate:g} seed {seed}: {line['loss']:.4f}", flush=True)
        with arguments.results.open("a") as results:
            results.write(json.dumps(line) + "\n")


def round_losses(metrics: Path) -> list[float]:
    """Mean training loss over the sites and steps of every round."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [statistics.fmean(line["losses"]) for line in lines if line["kind"] == "step"]
    return [round(statistics.fmean(steps[i : i + 16]), 4) for i in range(0, len(steps), 16)]


def table(arguments: argparse.Namespace) -> None:
    """Per overlap and rule: the best learning rate by the mean over seeds, and its losses."""
    lines = read(arguments.results)
    print("| overlap | rule | best learning rate | loss (nats per byte), mean | by seed |")
    print("|---|---|---|---|---|")
    for overlap in sorted({line["overlap"] for line in lines}):
        rows = []
        here = [line for line in lines if line["overlap"] == overlap]
        for rule in dict.fromkeys(line["rule"] for line in here):
            by_rate: dict[float, dict[int, float]] = {}
            for line in here:
                if line["rule"] == rule:
                    by_rate.setdefault(line["learning_rate"], {})[line["seed"]] = line["loss"]
            rate = min(by_rate, key=lambda r: statistics.fmean(by_rate[r].values()))
            losses = [by_rate[rate][seed] for seed in sorted(by_rate[rate])]
            rows.append((statistics.fmean(losses), rule, rate, losses))
        for mean, rule, rate, losses in sorted(rows):
            seeds = ", ".join(f"{loss:.4f}" for loss in losses)
            print(f"| {overlap} | {rule} | {rate:g} | {mean:.4f} | {seeds} |")


def key(line: dict) -> tuple:
    return line["rule"], line["learning_rate"], line["seed"], line["overlap"]


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (run, table):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--results", type=Path, required=True)
    runs = commands.choices["run"]
    runs.add_argument("--overlap", type=int, default=1)
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
