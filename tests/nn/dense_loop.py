# SPDX-License-Identifier: Apache-2.0
"""The layer written out: one token and one chosen expert at a time, without any op."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.nn import MoE


def dense_loop(moe: MoE, x: Tensor) -> Tensor:
    """What ``moe(x)`` must be for x (T, D); ghosts and dropped tokens are left out."""
    config, resident = moe.config, moe.experts.expert_ids
    candidates = resident if config.router == "partitioned" else range(config.num_experts)
    room = {expert: _capacity(moe, len(x), len(candidates)) for expert in candidates}
    outputs = []
    for token in x:
        y = torch.zeros_like(token)
        logits = moe.router.weight @ token
        if moe.router.bias is not None:
            logits = logits + moe.router.bias
        chosen = _choose(moe, logits.tolist(), candidates)
        for expert, weight in zip(chosen, _weights(moe, logits, chosen, candidates), strict=True):
            if expert in resident and room[expert] > 0:
                room[expert] -= 1
                y = y + weight * _feed_forward(moe, resident.index(expert), token)
        if config.shared_expert_dim > 0:
            y = y + _shared_expert(moe, token)
        outputs.append(y)
    return torch.stack(outputs)


def _capacity(moe: MoE, num_tokens: int, num_candidates: int) -> float:
    factor = moe.config.capacity_factor
    if factor is None:
        return math.inf
    return math.ceil(
        factor * num_tokens * min(moe.config.top_k, num_candidates) / max(num_candidates, 1)
    )


def _choose(moe: MoE, logits: list[float], candidates) -> list[int]:
    config = moe.config
    bias = [0.0] * config.num_experts
    if moe.load_balancer is not None:
        bias = moe.load_balancer.bias.tolist()
    squash = config.score == "sigmoid" and (moe.load_balancer or config.group_score == "top2_sum")
    score = [
        (1 / (1 + math.exp(-logit)) if squash else logit) + b
        for logit, b in zip(logits, bias, strict=True)
    ]
    group_size = config.num_experts // config.num_groups
    groups = {}  # those with candidates: the scores of their members, best first
    for expert in candidates:
        groups.setdefault(expert // group_size, []).append(score[expert])
    depth = 1 if config.group_score == "max" else 2
    rank = {g: sum(sorted(members, reverse=True)[:depth]) for g, members in groups.items()}
    best = sorted(rank, key=lambda group: -rank[group])[: config.top_k_groups]
    allowed = [expert for expert in candidates if expert // group_size in best]
    return sorted(allowed, key=lambda expert: -score[expert])[: config.top_k]


def _weights(moe: MoE, logits: Tensor, chosen, candidates) -> Tensor:
    config = moe.config
    if config.score == "unit":
        weights = torch.ones_like(logits)[chosen]
    elif config.score == "sigmoid":
        weights = logits[chosen].sigmoid()
    elif config.score_after_top_k:
        weights = logits[chosen].softmax(0)
    else:
        weights = logits[chosen].exp() / logits[list(candidates)].exp().sum()
    if config.renormalize:
        weights = weights / weights.sum()
    return config.scale * weights


def _feed_forward(moe: MoE, row: int | None, token: Tensor) -> Tensor:
    """An expert by its row, or the shared one."""
    weights = moe.shared_expert if row is None else moe.experts
    w1, w2, b1, b2 = (
        parameter if row is None or parameter is None else parameter[row]
        for parameter in (weights.w1, weights.w2, weights.b1, weights.b2)
    )
    hidden = w1 @ token if b1 is None else w1 @ token + b1
    if moe.config.activation == "silu":
        hidden = F.silu(hidden)
    else:
        gate, up = hidden.chunk(2)
        if moe.config.activation == "swiglu":
            hidden = F.silu(gate) * up
        else:  # gpt-oss
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return w2 @ hidden if b2 is None else w2 @ hidden + b2


def _shared_expert(moe: MoE, token: Tensor) -> Tensor:
    y = _feed_forward(moe, None, token)
    return y * (moe.shared_expert.gate.weight @ token).sigmoid() if moe.shared_expert.gate else y
