# SPDX-License-Identifier: Apache-2.0
"""What the FoE paper (arXiv 2605.06206) leaves open, tried out; and FoE against MoE at one size.

Runs train on the text of `fomoe demo`, one site, one thread, and write a JSON line each:

    python bench/studies/foe_against_moe.py ablate RESULTS    # norms, gates, losses: small models
    python bench/studies/foe_against_moe.py compare RESULTS   # a larger MoE and FoE, equal tokens
    python bench/studies/foe_against_moe.py table RESULTS
    python bench/studies/foe_against_moe.py plot RESULTS OUT.svg

Finished lines are not run again. `--part I N` does every Nth run from the Ith, for N processes.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

SMALL = {
    "dim": 128, "num_layers": 4, "num_heads": 4, "expert_dim": 64, "num_experts": 32, "top_k": 8,
}  # fmt: skip
LARGE = SMALL | {"dim": 192, "num_layers": 5, "expert_dim": 96, "num_kv_heads": 4}
FOE = {"family": "foe"}
ALL = {"softmax_over": "all"}
DECIDED = {"MoE": {"norm": "peri"}, "FoE": FOE | {"norm": "peri"}}  # by the ablation
SUM = {"residual_scale": 4.0}  # groups add up instead of being averaged
VARIANTS = {
    "MoE, softmax": {},
    "MoE, softmax, renormalised": {"renormalize": True},
    "MoE, peri norm": {"norm": "peri"},
    "FoE, softmax over all": FOE | ALL,
    "FoE, softmax over the group": FOE,
    "FoE, softmax over all, renormalised": FOE | ALL | {"renormalize": True},
    "FoE, sigmoid": FOE | {"score": "sigmoid"},
    "FoE, softmax over all, sum of groups": FOE | ALL | SUM,
    "FoE, softmax over the group, sum of groups": FOE | SUM,
    "FoE, renormalised, sum of groups": FOE | ALL | SUM | {"renormalize": True},
    "FoE, no balance loss": FOE | ALL | {"balance_loss_coefficient": 0.0},
    "FoE, peri norm": FOE | ALL | {"norm": "peri"},
    "FoE, peri norm, softmax over the group": FOE | {"norm": "peri"},
    "FoE, peri norm, softmax over the group, steps times 2": FOE
    | {"norm": "peri", "residual_scale": 2.0},
    "FoE, peri norm, softmax over the group, sum of groups": FOE | SUM | {"norm": "peri"},
    "FoE, peri norm, sigmoid": FOE | {"norm": "peri", "score": "sigmoid"},
}


def settings(model: dict, learning_rate: float, seed: int, steps: int, sequences: int) -> dict:
    return {
        "model": model,
        "federation": {
            "sites": 1,
            "strategy": "ddp",
            "local_steps": 20,
            "rounds": steps // 20,
        },
        "optimizer": {"lr": learning_rate, "warmup_steps": max(1, steps // 10)},
        "training": {"batch_size": sequences, "sequence_length": 256, "seed": seed, "threads": 1},
        "data": {"max_bytes": 16_000_000, "validation_sequences": 256},
        "evaluation": {"batch_size": 32, "every": max(1, steps // 200)},
    }


def train(results: Path, line: dict, configuration: dict) -> None:
    """Run it and append the line with its losses."""
    from fomoe.federation.config import Config
    from fomoe.federation.launch import train

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = {"folder": str(Path(folder) / "run"), "save": False}
        train(Config.model_validate(configuration | {"run": run}))
        metrics = Path(folder) / "run" / "metrics.jsonl"
        found = [json.loads(each) for each in metrics.read_text().splitlines()]
    losses = {20 * (e["round"] + 1): e["loss"] for e in found if e["kind"] == "evaluation"}
    line |= {"loss": losses[max(losses)], "losses": losses, "settings": configuration,
             "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(results: Path) -> list[dict]:
    return (
        [json.loads(each) for each in results.read_text().splitlines()] if results.exists() else []
    )


def key(line: dict) -> tuple:
    return line["study"], line["variant"], line["learning_rate"], line["seed"]


def run(arguments: argparse.Namespace) -> None:
    variants = VARIANTS
    if arguments.study == "compare":
        variants = {name: LARGE | decided for name, decided in DECIDED.items()}
    cells = list(itertools.product(arguments.seeds, variants, arguments.learning_rates))
    done = {key(line) for line in read(arguments.results)}
    index, parts = arguments.part
    for seed, variant, rate in cells[index::parts]:
        line = {"study": arguments.study, "variant": variant, "learning_rate": rate, "seed": seed}
        if key(line) in done:
            continue
        model = variants[variant] if arguments.study == "compare" else SMALL | variants[variant]
        sequences = 8 if arguments.study == "ablate" else 16
        train(arguments.results, line,
              settings(model, rate, seed, arguments.steps, sequences))  # fmt: skip
        print(variant, rate, seed, f"{line['loss']:.4f}", f"{line['seconds']} s", flush=True)


def table(arguments: argparse.Namespace) -> None:
    """The best learning rate of every variant, and its mean loss over the seeds."""
    lines = read(arguments.results)
    for study in dict.fromkeys(line["study"] for line in lines):
        print(f"\n| {study} | learning rate | validation loss (nats per byte) | seeds |")
        print("|---|---|---|---|")
        here = [line for line in lines if line["study"] == study]
        for variant in dict.fromkeys(line["variant"] for line in here):
            of_variant = [line for line in here if line["variant"] == variant]
            rates = {
                rate: [line["loss"] for line in of_variant if line["learning_rate"] == rate]
                for rate in dict.fromkeys(line["learning_rate"] for line in of_variant)
            }
            best = min(rates, key=lambda rate: statistics.mean(rates[rate]))
            losses = rates[best]
            spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
            mean = statistics.mean(losses)
            print(f"| {variant} | {best:g} | {mean:.3f}{spread} | {len(losses)} |")


def plot(arguments: argparse.Namespace) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    shades = {"MoE": "tab:blue", "FoE": "tab:orange"}
    named = set()
    for line in read(arguments.results):
        if line["study"] != "compare":
            continue
        training = line["settings"]["training"]
        per_step = training["batch_size"] * training["sequence_length"] / 1e6
        points = {int(step) * per_step: loss for step, loss in line["losses"].items()}
        label = None if line["variant"] in named else line["variant"]
        named.add(line["variant"])
        axes.plot(list(points), list(points.values()), ".-", color=shades[line["variant"]],
                  label=label)  # fmt: skip
    axes.set(xlabel="million bytes of text", ylabel="validation loss, nats per byte",
             title="One size, equal tokens: MoE and FoE")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="study", required=True)
    for name, steps in (("ablate", 160), ("compare", 260)):
        command = commands.add_parser(name)
        command.set_defaults(call=run)
        command.add_argument("results", type=Path)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--learning-rates", type=float, nargs="+", default=[5e-3])
        command.add_argument("--part", type=int, nargs=2, default=[0, 1])
    commands.add_parser("table").add_argument("results", type=Path)
    commands.choices["table"].set_defaults(call=table)
    drawing = commands.add_parser("plot")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("out", type=Path)
    drawing.set_defaults(call=plot)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
