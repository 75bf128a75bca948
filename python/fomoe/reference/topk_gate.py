# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.topk_gate``. T tokens, E experts, K = top_k."""

from typing import Literal

import torch
from torch import Tensor

from fomoe.ops.types import GateOutput


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
) -> GateOutput:
    """Choose ``top_k`` experts per token by logit and weigh them by their probability.

    Sigmoid weights are the FoMoE paper's (arXiv 2606.19025): not normalised, so that a missing
    expert leaves the others' weights alone. The probabilities behind ``prob_sum`` and the tie and
    NaN rules are our choice.

    Parameters
    ----------
    logits : Tensor, (T, E), float64 | float32 | bfloat16 | float16
        Selection is by descending logit, ties to the lowest index; NaN ranks below -inf.
    top_k : int
        1 <= top_k <= E.
    score : "softmax" or "sigmoid"
        softmax: p = softmax(logits), weight = p. sigmoid: s = sigmoid(logits), weight = s and
        p = s / sum_E s.
    renormalize : bool
        Divide a token's weights by their sum over K, before ``scale``.
    scale : float
        Factor on the weights.

    Returns
    -------
    GateOutput
        counts[e] = slots that chose e, prob_sum[e] = sum_t p[t, e],
        z_sum = sum_t logsumexp(logits[t])^2.

    Raises
    ------
    ValueError
        If ``score`` is unknown or ``top_k`` is out of range.
    """
    num_experts = logits.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"topk_gate: top_k must be in [1, {num_experts}], got {top_k}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = _rank(logits.detach())[:, :top_k]
    if score == "softmax":
        values = probabilities = torch.softmax(logits, dim=1)
    elif score == "sigmoid":
        values = torch.sigmoid(logits)
        probabilities = values / values.sum(dim=1, keepdim=True)
    else:
        raise ValueError(f"topk_gate: score must be 'softmax' or 'sigmoid', got {score!r}")
    weights = values.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    counts = counts.index_add(0, ids.flatten(), torch.ones_like(ids.flatten()))
    z_sum = torch.logsumexp(logits, dim=1).square().sum()
    return GateOutput(ids.to(torch.int32), weights * scale, counts, probabilities.sum(dim=0), z_sum)


def _rank(logits: Tensor) -> Tensor:
    """Expert indices (T, E) int64 of each token, best first.

    Stable sorts compose: wherever the first puts NaN, the second moves it to the end.
    """
    order = torch.argsort(logits, dim=1, descending=True, stable=True)
    is_nan = logits.isnan().gather(1, order)
    return order.gather(1, torch.argsort(is_nan.int(), dim=1, stable=True))
