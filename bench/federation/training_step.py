# SPDX-License-Identifier: Apache-2.0
"""A training step of the demo's model with fomoe's MoE layer and with Hugging Face's.

Forward, loss, backward, AdamW, float32, one thread, all in turns on the same tokens. The shape is
the demo's; as Hugging Face's block knows neither sigmoid scores nor experts of two matrices, both
have SwiGLU experts and renormalised softmax scores, with equal weights. fomoe's step includes the
balance and z losses and the routing statistics, Hugging Face's neither.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomoe.demo
from fomoe.bench.baselines import (
    HOW_TO_GET_HUGGING_FACE,
    HUGGING_FACE,
    OURS,
    hugging_face_block,
)
from fomoe.bench.machine import machine, versions
from fomoe.bench.timing import Plan, interleave, num_threads, paired_ratio, spread
from fomoe.federation.config import load_config
from fomoe.federation.task import LanguageModelTask
from fomoe.models import Decoder, DecoderConfig
from fomoe.nn import auxiliary_loss, initialize

_TOLERANCE = 1e-5
"""Of the losses of the first step, relative."""


class HuggingFaceLayer(nn.Module):
    """Qwen3MoeSparseMoeBlock with the weights of a :class:`fomoe.MoE`."""

    def __init__(self, classes: Any, implementation: str, config: DecoderConfig, moe: Any) -> None:
        super().__init__()
        settings_class, block_class = classes
        settings = settings_class(
            hidden_size=config.dim,
            moe_intermediate_size=config.expert_dim,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=True,
        )
        settings._experts_implementation = implementation
        self.block = block_class(settings)
        theirs = (
            self.block.gate.weight, self.block.experts.gate_up_proj, self.block.experts.down_proj
        )  # fmt: skip
        with torch.no_grad():
            for parameter, weight in zip(
                theirs, (moe.router.weight, moe.experts.w1, moe.experts.w2), strict=True
            ):
                parameter.copy_(weight)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.block(x_BSD)
        return y_BSD


def contenders(config: DecoderConfig, seed: int) -> dict[str, nn.Module]:
    ours = Decoder(config)
    initialize(ours, seed)
    models: dict[str, nn.Module] = {OURS: ours}
    classes = hugging_face_block()
    if classes is None:
        raise SystemExit(HOW_TO_GET_HUGGING_FACE)
    for implementation in HUGGING_FACE:
        model = copy.deepcopy(ours)
        for layer in model.layers:
            layer.moe = HuggingFaceLayer(classes, implementation, config, layer.moe)
        models[f"hf_{implementation}"] = model
    return models


def language_model_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def check_agreement(models: dict[str, nn.Module], tokens: Tensor) -> dict[str, float]:
    with torch.no_grad():
        losses = {name: float(language_model_loss(m, tokens)) for name, m in models.items()}
    for name, loss in losses.items():
        if abs(loss / losses[OURS] - 1) > _TOLERANCE:
            raise SystemExit(f"{name}: loss {loss}, but {OURS}'s is {losses[OURS]}")
    return losses


def prepared_step(model: nn.Module, lr: float) -> Callable[[Tensor], Callable[[], None]]:
    # As the trainer's on a CPU; at so low a rate the routing stays as it was drawn.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False, fused=False)
    is_ours = not isinstance(model.layers[0].moe, HuggingFaceLayer)

    def prepare(tokens: Tensor) -> Callable[[], None]:
        optimizer.zero_grad(set_to_none=True)

        def call() -> None:
            loss = language_model_loss(model, tokens)
            if is_ours:
                loss = loss + auxiliary_loss(model)
            torch.autograd.backward(loss)
            optimizer.step()

        return call

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--output", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    settings = load_config(Path(fomoe.demo.__file__).with_name("demo.toml"))
    training = settings.training
    config = replace(
        LanguageModelTask(settings).model_config,
        activation="swiglu",
        score="softmax",
        renormalize=True,
    )
    size = training.batch_size, training.sequence_length + 1
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randint(config.vocab_size, size, generator=generator)

    with num_threads(1):
        about = {
            "benchmark": "training_step",
            "config": asdict(config),
            "tokens": size[0] * (size[1] - 1),
            "machine": machine(["fp32"], 1, torch.device("cpu")),
            "versions": versions(),
        }
        models = contenders(config, training.seed)
        losses = check_agreement(models, draw())
        steps = {name: prepared_step(model, 1e-5) for name, model in models.items()}
        times = interleave(steps, draw, Plan(seconds=arguments.seconds))
    records = []
    for name, seconds in times.items():
        own, ratio = spread(seconds), paired_ratio(seconds, times[OURS])
        record = {
            "contender": name,
            "loss": losses[name],
            "repetitions": len(seconds),
            "median_ms": own.median * 1e3,
            "quartiles_ms": [own.low * 1e3, own.high * 1e3],
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
        }
        records.append(record | about)
        print(
            f"{name:<14}{own.median * 1e3:8.1f} ms ({own.low * 1e3:.1f}-{own.high * 1e3:.1f})  "
            f"{ratio.median:.2f}x fomoe's ({ratio.low:.2f}-{ratio.high:.2f})"
        )
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
