# SPDX-License-Identifier: Apache-2.0
"""`fomoe generate` on one device, a MoE beside a FoE of its shape: what FoE's form costs there.

    python bench/generation/speed.py --device cuda --name foe-1b --output RESULTS.jsonl

In turns, median and quartiles: the forward of all prompts' tokens, the time to the first tokens
(prefill), and a step of decode, with tokens/s of all sequences together. On a GPU also a step by
CUDA graphs, and in how many steps its tokens are the same: rounding differs with the number of
positions that attention covers.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fomoe.bench.machine import versions
from fomoe.bench.timing import in_turns, paired_ratio, spread
from fomoe.generate import Generation, cuda_graphs, stream
from fomoe.generate.decode_graph import Capture
from fomoe.models import (
    DecoderConfig,
    FoEConfig,
    LanguageModel,
    LanguageModelConfig,
    build_model,
    configuration,
)
from fomoe.nn import initialize

MOE, FOE = "MoE", "FoE"
GRAPH = "step by CUDA graph"


def models(name: str, device: torch.device) -> dict[str, LanguageModel]:
    """In bfloat16, with random weights."""
    foe = configuration(name)
    assert isinstance(foe, FoEConfig)
    common = {f.name: getattr(foe, f.name) for f in fields(LanguageModelConfig)}
    built = {}
    for kind, config in ((MOE, DecoderConfig(**common)), (FOE, foe)):
        with torch.device("meta"):
            model = build_model(config).bfloat16()
        model.to_empty(device=device)
        initialize(model, seed=0)
        built[kind] = model.eval()
    return built


def phases(device: torch.device) -> list[str]:
    return ["forward", "first", "step", *([GRAPH] if device.type == "cuda" else [])]


def forward(model: LanguageModel, tokens: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return [timed(lambda: model.unembed(model.hidden(tokens)[:, -1]), tokens.device)]


def steps(
    model: LanguageModel, prompts: list[list[int]], new_tokens: int, capture: Capture | None = None
) -> tuple[list[float], list[dict[int, int]]]:
    """Seconds to the first tokens, and to each that follows, and they; a step ends on the host."""
    times, tokens = [time.perf_counter()], []
    for step in stream(model, prompts, Generation(max_new_tokens=new_tokens), capture=capture):
        times.append(time.perf_counter())
        tokens.append(step)
    return [end - begin for begin, end in itertools.pairwise(times)], tokens


def timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    device = torch.device(arguments.device)
    both = models(arguments.name, device)
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(1000, (batch, arguments.prompt), generator=generator)
    found: dict[str, dict[str, list[float]]] = {what: {MOE: [], FOE: []} for what in phases(device)}
    same_tokens: dict[str, float] = {}
    for repetition in range(-1, arguments.repetitions):  # the first is not counted
        for kind in in_turns([MOE, FOE], repetition + 1):
            taken = {"forward": forward(both[kind], tokens.to(device))[0]}
            (first, *rest), new = steps(both[kind], tokens.tolist(), arguments.new_tokens)
            taken |= {"first": first, "step": sum(rest) / len(rest)}
            if GRAPH in found:
                (_, _, *rest), by_graph = steps(  # the first replay has the capture before it
                    both[kind], tokens.tolist(), arguments.new_tokens, cuda_graphs(device)
                )
                same_tokens[kind] = sum(map(dict.__eq__, by_graph, new)) / len(new)
                taken[GRAPH] = sum(rest) / len(rest)
            if repetition >= 0:
                for what, seconds in taken.items():
                    found[what][kind].append(seconds)
    record: dict[str, Any] = {"batch": batch, "same_tokens": same_tokens}
    for what, times in found.items():
        record[what] = {
            "seconds": {kind: spread(values)._asdict() for kind, values in times.items()},
            "foe_over_moe": paired_ratio(times[FOE], times[MOE])._asdict(),
        }
    record["tokens_per_second"] = {
        kind: batch / record["step"]["seconds"][kind]["median"] for kind in both
    }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="foe-1b", help="a named FoE")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    about = {
        "benchmark": "generation", "name": arguments.name, "device": arguments.device,
        "prompt": arguments.prompt, "new_tokens": arguments.new_tokens, "versions": versions(),
    }  # fmt: skip
    for batch in arguments.batches:
        record = measure(arguments, batch)
        for what in phases(torch.device(arguments.device)):
            seconds, ratio = record[what]["seconds"], record[what]["foe_over_moe"]
            print(
                f"batch {batch:4} {what:18} MoE {seconds[MOE]['median'] * 1e3:9.2f} ms"
                f"  FoE {seconds[FOE]['median'] * 1e3:9.2f} ms  FoE/MoE {ratio['median']:.2f}"
                f" ({ratio['low']:.2f}-{ratio['high']:.2f})",
                flush=True,
            )
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps(about | record) + "\n")


if __name__ == "__main__":
    main()
