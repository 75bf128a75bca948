# SPDX-License-Identifier: Apache-2.0
"""What a site saves by skipping the experts it does not hold.

Everything is computed as the trainer computes it with ``training.precision = "bf16"``: float32
weights under bfloat16 autocast.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.bench.clock import Call, clock_of
from fomoe.bench.flops import decoder_flops, ideal_speedup
from fomoe.bench.timing import Plan, interleave, paired_ratio, spread
from fomoe.models import CONFIGURATIONS, Decoder, DecoderConfig
from fomoe.nn import MoE, auxiliary_loss, initialize
from fomoe.ops import expert_mlp, route, topk_gate

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PARTS = ("experts", "layer", "step")


class Model(NamedTuple):
    """What is measured: the layer alone on ``layer_tokens``, and steps on (batch, sequence)."""

    name: str
    config: DecoderConfig
    layer_tokens: int
    batch: int
    sequence: int


_FOMOE_153M = CONFIGURATIONS["fomoe-153m"]
assert isinstance(_FOMOE_153M, DecoderConfig)
MODELS = (
    # FoMoE's 150M shape (Table 1) on bytes, which is what the trainer trains: with the paper's
    # vocabulary of 200,019 the unembedding would be 79% of the FLOPs and hide the layers.
    Model("fomoe-153m", replace(_FOMOE_153M, vocab_size=256), 2048, 2, 256),
    # The proportions of fine-grained models of today (OLMoE, Qwen3): narrow gated experts, 8 per
    # token, grouped key and value heads. Experts are 79% of the FLOPs, and the five fit 2 GB.
    Model(
        "expert-heavy",
        DecoderConfig(
            vocab_size=256,
            dim=512,
            num_layers=4,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            expert_dim=256,
            num_experts=32,
            top_k=8,
            renormalize=True,
        ),
        2048,
        2,
        256,
    ),
)


# A layer of Qwen3-30B-A3B with the tokens of a training step; its attention in the decoder.
CUDA_MODELS = (
    Model(
        "qwen3-30b-layers",
        DecoderConfig(
            vocab_size=256,
            dim=2048,
            num_layers=2,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
            expert_dim=768,
            num_experts=128,
            top_k=8,
            renormalize=True,
        ),
        32768,
        4,
        4096,
    ),
)


def measure_skipping(
    models: Sequence[Model], plan: Plan, progress: Callable[[str], object], device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """The records of one part of a model after the other: of each share of ghosts, 0 first."""
    measure = {"experts": _measure_experts, "layer": _measure_layer, "step": _measure_step}
    for model in models:
        for part in PARTS:
            progress(f"{model.name} {part}")
            times, ghost_shares = measure[part](model, plan, device)
            yield _records(model, part, times, ghost_shares)


def residents(config: DecoderConfig, ghost_share: float, layer: int = 0) -> list[int]:
    """Ascending ids of the first (1 - ghost_share) * E experts, shifted by the layer's index."""
    count = round(config.num_experts * (1 - ghost_share))
    return sorted((expert + layer) % config.num_experts for expert in range(count))


def _records(
    model: Model, part: str, times: Mapping[float, list[float]], ghost_shares: Mapping[float, float]
) -> list[dict[str, Any]]:
    flops = decoder_flops(model.config, model.sequence)
    expert_share = {
        "experts": 1.0,
        "layer": flops.expert_share_of_layer,
        "step": flops.expert_share,
    }[part]
    tokens = model.batch * model.sequence if part == "step" else model.layer_tokens
    records = []
    for share, seconds in times.items():
        own, cost = spread(seconds), paired_ratio(seconds, times[0.0])
        bound = None  # nothing would be left to do
        if expert_share * ghost_shares[share] < 1:
            bound = ideal_speedup(expert_share, ghost_shares[share])
        records.append(
            {
                "model": model.name,
                "config": asdict(model.config),
                "part": part,
                "tokens": tokens,
                "sequence": model.sequence,
                "wanted_ghost_share": share,
                "ghost_share": ghost_shares[share],
                "repetitions": len(seconds),
                "median_ms": own.median * 1e3,
                "quartiles_ms": [own.low * 1e3, own.high * 1e3],
                "best_ms": own.best * 1e3,
                "tokens_per_second": tokens / own.median,
                "cost": cost.median,
                "cost_quartiles": [cost.low, cost.high],
                "expert_flop_share": expert_share,
                "ideal_speedup": bound,
            }
        )
    return records


class _ExpertBatch(NamedTuple):
    x: Tensor  # (T, D), bfloat16
    grad_y: Tensor  # (T, D), bfloat16
    ids: Tensor  # (T, K)
    weights: Tensor  # (T, K)


def _measure_experts(
    model: Model, plan: Plan, device: torch.device
) -> tuple[dict[float, list[float]], dict[float, float]]:
    """route and expert_mlp, forward and backward, on what the layer hands them."""
    config, generator = model.config, torch.Generator(device).manual_seed(1)
    ghosts: dict[float, list[float]] = {share: [] for share in SHARES}

    def draw() -> _ExpertBatch:
        logits = torch.randn(
            model.layer_tokens, config.num_experts, generator=generator, device=device
        )
        gate = topk_gate(logits, config.top_k, score=config.score, renormalize=config.renormalize)
        size = (2, model.layer_tokens, config.dim)
        x, grad_y = torch.randn(size, generator=generator, device=device).bfloat16().unbind()
        return _ExpertBatch(x, grad_y, gate.ids, gate.weights)

    def contender(share: float) -> Callable[[_ExpertBatch], Call]:
        moe = MoE(config.moe(), residents(config, share))
        initialize(moe, 0)
        moe.to(device)
        w1, w2 = (w.detach().bfloat16().requires_grad_() for w in moe.experts.parameters())

        def prepare(batch: _ExpertBatch) -> Call:
            w1.grad = w2.grad = None
            x, weights = (t.detach().requires_grad_() for t in (batch.x, batch.weights))
            is_ghost = moe.expert_map[batch.ids] < 0
            ghosts[share].append(float(is_ghost.double().mean()))

            def call() -> None:
                routing = route(batch.ids, moe.expert_map, len(w1))
                y = expert_mlp(x, weights, w1, w2, routing, config.activation)
                torch.autograd.backward(y, batch.grad_y)

            return call

        return prepare

    times = interleave({share: contender(share) for share in SHARES}, draw, plan, clock_of(device))
    return times, {share: sum(found) / len(found) for share, found in ghosts.items()}


class _LayerBatch(NamedTuple):
    x: Tensor  # (T, D), float32
    grad_y: Tensor  # (T, D), bfloat16


def _measure_layer(
    model: Model, plan: Plan, device: torch.device
) -> tuple[dict[float, list[float]], dict[float, float]]:
    """The layer with its losses, forward and backward."""
    config, generator = model.config, torch.Generator(device).manual_seed(1)
    layers = {share: MoE(config.moe(), residents(config, share)) for share in SHARES}

    def draw() -> _LayerBatch:
        size = (2, model.layer_tokens, config.dim)
        x, grad_y = torch.randn(size, generator=generator, device=device).unbind()
        return _LayerBatch(x, grad_y.bfloat16())

    def contender(moe: MoE) -> Callable[[_LayerBatch], Call]:
        initialize(moe, 0)
        moe.to(device)

        def prepare(batch: _LayerBatch) -> Call:
            moe.zero_grad(set_to_none=True)
            x = batch.x.detach().requires_grad_()

            def call() -> None:
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    y = moe(x)
                torch.autograd.backward([y, moe.auxiliary_loss], [batch.grad_y, None])

            return call

        return prepare

    times = interleave(
        {share: contender(moe) for share, moe in layers.items()}, draw, plan, clock_of(device)
    )
    return times, {share: _ghost_share(moe) for share, moe in layers.items()}


def _measure_step(
    model: Model, plan: Plan, device: torch.device
) -> tuple[dict[float, list[float]], dict[float, float]]:
    """Forward, loss, backward and AdamW of the whole decoder, on random tokens."""
    config, generator = model.config, torch.Generator(device).manual_seed(1)
    decoders = {
        share: Decoder(
            config, [residents(config, share, layer) for layer in range(config.num_layers)]
        )
        for share in SHARES
    }

    def draw() -> Tensor:
        size = (model.batch, model.sequence + 1)
        return torch.randint(config.vocab_size, size, generator=generator, device=device)

    def contender(decoder: Decoder) -> Callable[[Tensor], Call]:
        initialize(decoder, 0)
        decoder.to(device)
        # As the trainer's, at a rate so low that the router stays as balanced as it was drawn.
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, foreach=False, fused=False)

        def prepare(tokens: Tensor) -> Call:
            optimizer.zero_grad(set_to_none=True)

            def call() -> None:
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    logits = decoder(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
                torch.autograd.backward(loss + auxiliary_loss(decoder))
                optimizer.step()

            return call

        return prepare

    times = interleave(
        {share: contender(decoders[share]) for share in SHARES}, draw, plan, clock_of(device)
    )
    return times, {share: _ghost_share(decoder) for share, decoder in decoders.items()}


def _ghost_share(model: nn.Module) -> float:
    """Mean over the layers, and over all that has run."""
    shares = [m.statistics().ghost_share for m in model.modules() if isinstance(m, MoE)]
    return sum(shares) / len(shares)
