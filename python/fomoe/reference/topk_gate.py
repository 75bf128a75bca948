# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.topk_gate``. T tokens, E experts, K = top_k."""

from typing import Literal

import torch
from torch import Tensor

from fomoe.ops.types import GateOutput
from fomoe.reference._score import sigmoid_bits, sigmoid_limit


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid", "unit"] = "softmax",
    score_after_top_k: bool = False,
    bias: Tensor | None = None,
    resident: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    renormalize: bool = False,
    scale: float = 1.0,
) -> GateOutput:
    """Choose ``top_k`` experts per token by score and weigh them by their value.

    Arguments, results and formulas are those of ``fomoe.ops.topk_gate``. Selection reproduces the
    bits of the kernels' scores.

    Raises
    ------
    ValueError
        If a setting is unknown or out of range, or ``bias`` or ``resident`` has another shape or
        dtype than it should.
    """
    num_experts = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    _check(logits, top_k, score, bias, resident, num_groups, top_k_groups, group_score)

    experts = torch.arange(num_experts, device=logits.device)  # the eligible ones
    if resident is not None:
        experts = experts[resident]
    eligible = logits[:, experts]  # whatever the others hold reaches nothing

    of_sum = num_groups > 1 and group_score == "top2_sum"
    scores = eligible.detach()
    if score == "sigmoid" and (bias is not None or of_sum):
        scores = sigmoid_bits(scores)
    if bias is not None:
        scores = scores + bias.detach()[experts]
    groups = experts // (num_experts // num_groups)
    is_allowed = _in_best_groups(scores, groups, top_k_groups, group_score)
    order = _rank(scores, is_allowed)[:, :top_k]
    is_choice = is_allowed.gather(1, order)

    weights, probabilities = _weigh(
        eligible, order, is_choice, score, score_after_top_k, renormalize
    )
    ids = torch.where(is_choice, experts[order], -1)
    missing = (0, top_k - order.shape[1])  # there may be fewer eligible experts than top_k
    ids = torch.nn.functional.pad(ids, missing, value=-1)
    weights = torch.nn.functional.pad(weights, missing) * scale
    chosen = ids[ids >= 0]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    counts = counts.index_add(0, chosen, torch.ones_like(chosen))
    prob_sum = logits.new_zeros(num_experts).index_add(0, experts, probabilities.sum(dim=0))
    if experts.numel() > 0:
        z_sum = torch.logsumexp(eligible, dim=1).square().sum()
    else:
        z_sum = eligible.sum()
    return GateOutput(ids.to(torch.int32), weights, counts, prob_sum, z_sum)


def _weigh(
    logits: Tensor,
    order: Tensor,
    is_choice: Tensor,
    score: str,
    score_after_top_k: bool,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Weights of the choices, 0 where there is none, before ``scale``; probabilities (T, E)."""
    probabilities = torch.softmax(logits, dim=1)
    if score == "sigmoid":
        values = torch.sigmoid(logits).masked_fill(logits < -sigmoid_limit(logits.dtype), 0)
        probabilities = _shares(values)
        weights = values.gather(1, order)
    elif score == "unit":
        ones = logits.masked_fill(logits.new_ones((), dtype=torch.bool), 1)  # part of the graph
        weights = ones.gather(1, order)
    elif score_after_top_k:
        weights = torch.softmax(logits.gather(1, order).masked_fill(~is_choice, -torch.inf), dim=1)
    else:
        weights = probabilities.gather(1, order)
    weights = torch.where(is_choice, weights, 0)
    if renormalize:  # NaN among the choices makes their shares NaN, and no others
        weights = torch.where(is_choice, _shares(weights), 0)
    return weights, probabilities


def _shares(values: Tensor) -> Tensor:
    """Values over their sum; 0 with zero gradient where that is 0."""
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total == 0, 0, values / torch.where(total == 0, 1, total))


def _rank(scores: Tensor, is_allowed: Tensor) -> Tensor:
    """Indices (T, n) int64 of each token, best first, those that are not allowed last.

    Stable sorts compose: wherever the first puts NaN, the second moves it to the end.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    last = torch.where(is_allowed, scores.isnan().int(), 2).gather(1, order)
    return order.gather(1, torch.argsort(last, dim=1, stable=True))


def _in_best_groups(scores: Tensor, groups: Tensor, top_k_groups: int, group_score: str) -> Tensor:
    """Whether each expert (T, E) is in one of its token's best groups; groups (E,) ascends."""
    present = sorted(set(groups.tolist()))  # a group without eligible experts is never taken
    group_scores = scores.new_empty(scores.shape[0], len(present))
    for index, group in enumerate(present):
        members = scores[:, groups == group]
        members = members.gather(1, _rank(members, torch.ones_like(members, dtype=torch.bool)))
        number = 2 if group_score == "top2_sum" else 1
        group_scores[:, index] = members[:, :number].sum(dim=1)
    best = _rank(group_scores, torch.ones_like(group_scores, dtype=torch.bool))[:, :top_k_groups]
    chosen = groups.new_tensor(present)[best]  # (T, top_k_groups)
    is_in_best: Tensor = (groups == chosen.unsqueeze(2)).any(dim=1)
    return is_in_best


def _check(
    logits: Tensor,
    top_k: int,
    score: str,
    bias: Tensor | None,
    resident: Tensor | None,
    num_groups: int,
    top_k_groups: int,
    group_score: str,
) -> None:
    num_experts = logits.shape[1]

    def require(condition: bool, what: str, got: object) -> None:
        if not condition:
            raise ValueError(f"topk_gate: {what}, got {got}")

    require(
        score in ("softmax", "sigmoid", "unit"),
        "score must be 'softmax', 'sigmoid' or 'unit'",
        repr(score),
    )
    require(
        group_score in ("max", "top2_sum"),
        "group_score must be 'max' or 'top2_sum'",
        repr(group_score),
    )
    require(1 <= top_k <= num_experts, f"top_k must be in [1, {num_experts}]", top_k)
    require(
        num_groups >= 1 and num_experts % num_groups == 0,
        f"num_groups must divide the {num_experts} experts",
        num_groups,
    )
    require(
        1 <= top_k_groups <= num_groups, f"top_k_groups must be in [1, {num_groups}]", top_k_groups
    )
    group_size = num_experts // num_groups
    require(
        top_k <= top_k_groups * group_size,
        f"top_k_groups must be at least {-(-top_k // group_size)} for top_k = {top_k}",
        top_k_groups,
    )
    for name, tensor, dtype in (("bias", bias, logits.dtype), ("resident", resident, torch.bool)):
        if tensor is not None:
            require(
                tensor.shape == (num_experts,) and tensor.dtype == dtype,
                f"{name} must be {dtype} of shape ({num_experts},)",
                f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            )
