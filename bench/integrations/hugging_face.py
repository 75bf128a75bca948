# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-MoE model of transformers as it is and with `replace_moe_blocks`: forward, and training.

A contender more, `fomoe_experts`, has the router of transformers: what our gate adds. Whole models
with equal weights, all in turns on the same tokens, one thread. Training is the forward in training
mode, loss and backward, without an optimizer.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fomoe.bench.machine import machine, versions
from fomoe.bench.timing import Plan, interleave, num_threads, paired_ratio, spread
from fomoe.integrations.transformers import replace_moe_blocks

OURS = "fomoe"
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Of the logits, relative in the Frobenius norm."""


def contenders(dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    original = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).to(dtype)
    models = {OURS: copy.deepcopy(original)}
    assert replace_moe_blocks(models[OURS]) == SIZES["num_hidden_layers"]
    experts = {"fomoe_experts": "fomoe", "hf_grouped_mm": "grouped_mm", "hf_eager": "eager"}
    for name, implementation in experts.items():
        models[name] = copy.deepcopy(original)
        models[name].set_experts_implementation(implementation)
    return models


def check_agreement(models: dict[str, nn.Module], tokens: Tensor, tolerance: float) -> None:
    with torch.no_grad():
        logits = {name: model(tokens).logits.float() for name, model in models.items()}
    for name, other in logits.items():
        difference = float((other - logits[OURS]).norm() / logits[OURS].norm())
        if not difference < tolerance:
            raise SystemExit(f"{name}: logits differ from {OURS}'s by {difference}")


def prepared(model: nn.Module, is_training: bool) -> Callable[[Tensor], Callable[[], None]]:
    def prepare(tokens: Tensor) -> Callable[[], None]:
        model.zero_grad(set_to_none=True)
        model.train(is_training)

        def call() -> None:
            if is_training:
                model(tokens, labels=tokens, use_cache=False).loss.backward()
                return
            with torch.no_grad():
                model(tokens, use_cache=False)

        return call

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each pass")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        size = (arguments.batch, arguments.length)
        return torch.randint(SIZES["vocab_size"], size, generator=generator)

    records: list[dict[str, Any]] = []
    with num_threads(1):
        about = {
            "benchmark": "hugging_face",
            "config": SIZES,
            "dtype": arguments.dtype,
            "batch": arguments.batch,
            "length": arguments.length,
            "machine": machine([arguments.dtype], 1, torch.device("cpu")),
            "versions": versions(),
        }
        models = contenders(DTYPES[arguments.dtype])
        check_agreement(models, draw(), _TOLERANCE[arguments.dtype])
        for is_training in (False, True):
            work = {name: prepared(model, is_training) for name, model in models.items()}
            times = interleave(work, draw, Plan(seconds=arguments.seconds))
            what = "training" if is_training else "forward"
            records += [
                {"pass": what, "contender": name, **_row(what, name, times)} | about
                for name in times
            ]
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _row(what: str, name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    own, ratio = spread(times[name]), paired_ratio(times[name], times[OURS])
    print(
        f"{what:<10}{name:<14}{own.median * 1e3:8.1f} ms ({own.low * 1e3:.1f}-"
        f"{own.high * 1e3:.1f})  {ratio.median:.2f}x fomoe's ({ratio.low:.2f}-{ratio.high:.2f})"
    )
    return {
        "repetitions": len(times[name]),
        "median_ms": own.median * 1e3,
        "quartiles_ms": [own.low * 1e3, own.high * 1e3],
        "ratio": ratio.median,
        "ratio_quartiles": [ratio.low, ratio.high],
    }


if __name__ == "__main__":
    main()
