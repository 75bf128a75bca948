# SPDX-License-Identifier: Apache-2.0
"""50 steps of training with two sites on one GPU: is the loss the CPU's, how fast, how much memory.

    python bench/federation/train_on_gpu.py [--device cuda] [--strategy fomoe] [--shape small]

Writes one JSON line per run to standard output. With `small`, the run is repeated on the CPU with
the same seed (bf16 with fp32 masters on both), and exit status 1 says that the losses differ by
more than 1%. `large` is for the speed: tokens per second, peak memory of a site on the device, and
the share of a step that the MoE layers take.
"""

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"dim": 384, "num_layers": 6, "num_heads": 6, "expert_dim": 192,
                  "num_experts": 32, "top_k": 4, "score": "sigmoid", "norm": "peri"},
        "training": {"batch_size": 8, "sequence_length": 256},
    },
    "large": {
        "model": {"dim": 2048, "num_layers": 8, "num_heads": 16, "expert_dim": 768,
                  "num_experts": 64, "top_k": 8, "score": "sigmoid", "norm": "peri"},
        "training": {"batch_size": 8, "sequence_length": 2048},
    },
}  # fmt: skip
TOLERANCE = 0.01


def settings(shape: str, strategy: str, device: str, folder: str) -> dict[str, Any]:
    overlap = {"overlap": 1} if strategy == "fomoe" else {}
    chosen = SHAPES[shape]
    return {
        "model": chosen["model"],
        "federation": {
            "strategy": strategy, "sites": 2, "local_steps": 25, "rounds": 2, **overlap,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 10},
        "training": {**chosen["training"], "precision": "bf16", "device": device},
        "data": {"max_bytes": 20_000_000, "validation_sequences": 32},
        "evaluation": {"batch_size": 8},
        "run": {"folder": folder, "save": False},
    }  # fmt: skip


def train(shape: str, strategy: str, device: str) -> dict[str, Any]:
    """One run; its losses, speed and memory."""
    from fomoe.federation.config import Config
    from fomoe.federation.launch import train as run

    with tempfile.TemporaryDirectory() as folder:
        config = settings(shape, strategy, device, f"{folder}/run")
        begin = time.perf_counter()
        summary = run(Config.from_dict(config))
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    return {
        "bench": "train", "shape": shape, "strategy": strategy, "device": device,
        "loss": summary["loss"],
        "last_step_losses": steps[-1]["losses"],
        "tokens_per_second": summary["tokens_per_second"],
        "seconds_with_start": time.perf_counter() - begin,
        "memory_per_site": summary["memory_per_site"],
        "parameters_per_site": summary["parameters_per_site"],
        "commit": summary["commit"], "versions": summary["versions"],
    }  # fmt: skip


def moe_share(shape: str, device: str, repetitions: int = 10) -> dict[str, Any]:
    """Time of a site's training step, and of the MoE layers in it, forward and backward.

    Medians over repetitions, from events on the device around each layer's forward and backward.
    """
    from fomoe.federation.config import Config
    from fomoe.federation.inner_optimizer import InnerOptimizer
    from fomoe.federation.parameters import federated_tensors
    from fomoe.federation.placement import placement_of_round
    from fomoe.federation.task import LanguageModelTask

    config = Config.from_dict(settings(shape, "fomoe", device, "unused"))
    task = LanguageModelTask(config)
    place = placement_of_round(config, task.num_layers, task.num_experts, 0)
    model = task.build_model(place.residents(0)).to(device)
    optimizer = InnerOptimizer(federated_tensors(model), config.optimizer)
    batch = task.batch(0, 0).to(device)
    steps, layers = [], []
    with watched(model) as spans:
        for _ in range(repetitions + 3):
            spans.clear()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            model.zero_grad(set_to_none=True)
            task.loss(model, batch).objective.backward()
            optimizer.step(1e-3)
            end.record()
            torch.cuda.synchronize()
            steps.append(begin.elapsed_time(end))
            layers.append(sum(first.elapsed_time(last) for first, last in spans))
    shares = sorted(x / y for x, y in zip(layers[3:], steps[3:], strict=True))
    return {
        "bench": "moe share", "shape": shape, "device": device,
        "step_ms": sorted(steps[3:])[repetitions // 2],
        "moe_ms": sorted(layers[3:])[repetitions // 2],
        "moe_share": {"median": shares[repetitions // 2], "low": shares[0], "high": shares[-1]},
    }  # fmt: skip


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Collects pairs of events around the forward and the backward of every MoE layer."""
    from fomoe.nn import MoE

    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    open_at: dict[tuple[int, str], torch.cuda.Event] = {}

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def opening(way: str) -> Any:
        return lambda module, *_: open_at.__setitem__((id(module), way), now())

    def closing(way: str) -> Any:
        return lambda module, *_: spans.append((open_at[id(module), way], now()))

    handles = []
    for module in model.modules():
        if isinstance(module, MoE):
            handles += [
                module.register_forward_pre_hook(opening("forward")),
                module.register_forward_hook(closing("forward")),
                module.register_full_backward_pre_hook(opening("backward")),
                module.register_full_backward_hook(closing("backward")),
            ]
    yield spans
    for handle in handles:
        handle.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--strategy", nargs="+", default=["fomoe", "diloco"])
    parser.add_argument("--shape", nargs="+", default=["small", "large"], choices=SHAPES)
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    about = {"machine": torch.cuda.get_device_name() if cuda else platform.processor()}
    worst = 0.0
    for shape in arguments.shape:
        for strategy in arguments.strategy:
            line = train(shape, strategy, arguments.device)
            if shape == "small" and cuda:
                reference = train(shape, strategy, "cpu")
                line["loss_on_cpu"] = reference["loss"]
                line["of_loss_on_cpu"] = line["loss"] / reference["loss"]
                worst = max(worst, abs(line["of_loss_on_cpu"] - 1))
            print(json.dumps(about | line), flush=True)
        if cuda:
            print(json.dumps(about | moe_share(shape, arguments.device)), flush=True)
    if worst > TOLERANCE:
        print(f"the loss differs from the CPU's by {worst:.1%}", file=sys.stderr)
    return 1 if worst > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
