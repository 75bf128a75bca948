# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.expert_mlp``. T tokens, D width, F expert width, K choices."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.ops.types import Routing
from fomoe.reference.combine import combine
from fomoe.reference.grouped_gemm import grouped_gemm
from fomoe.reference.permute import permute


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: Routing,
    activation: Literal["swiglu", "silu", "swiglu_clamped"] = "swiglu",
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """y[t] = sum_k weights[t, k] * expert(x[t]) over the resident experts token t chose.

    The pre-activation, the activation and each expert's output are rounded to the dtype of x.
    ``silu`` is the FoMoE paper's two-matrix expert (arXiv 2606.19025), ``swiglu_clamped`` that of
    gpt-oss (arXiv 2508.10925).

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
    weights : Tensor, (T, K), accumulation dtype of x
    w1 : Tensor, (E_local, 2F, D), gate rows before up rows; (E_local, F, D) for silu
    w2 : Tensor, (E_local, D, F)
    routing : Routing
    activation : "swiglu" for h = silu(gate) * up; "silu" for h = silu(pre); "swiglu_clamped" for
        h = g * sigmoid(1.702 g) * (u + 1), g = min(gate, 7), u = up clamped to [-7, 7]
    b1, b2 : Tensor, (E_local, rows of w1) and (E_local, D), dtype of x, or None

    Returns
    -------
    Tensor, (T, D), dtype of x

    Raises
    ------
    ValueError
        If ``activation`` is unknown.
    """
    pre_activation = _affine(permute(x, routing), w1, b1, routing.offsets)
    wide = pre_activation.to(torch.promote_types(x.dtype, torch.float32))
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=1)
        hidden = F.silu(gate) * up
    elif activation == "silu":
        hidden = F.silu(wide)
    elif activation == "swiglu_clamped":
        gate, up = wide.chunk(2, dim=1)
        gate = gate.clamp(max=7.0)
        hidden = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    else:
        expected = "'swiglu', 'silu' or 'swiglu_clamped'"
        raise ValueError(f"expert_mlp: activation must be {expected}, got {activation!r}")
    return combine(_affine(hidden.to(x.dtype), w2, b2, routing.offsets), weights, routing)


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """rows[r] @ weight[e]^T + bias[e], rounded once; only rows of experts get a bias."""
    if bias is None:
        return grouped_gemm(rows, weight, offsets)
    wide = torch.promote_types(rows.dtype, torch.float32)
    products = grouped_gemm(rows.to(wide), weight.to(wide), offsets)
    group_sizes = offsets.diff().long()
    addends = bias.to(wide).repeat_interleave(group_sizes, dim=0)
    tail = addends.new_zeros(rows.shape[0] - addends.shape[0], addends.shape[1])
    return (products + torch.cat([addends, tail])).to(rows.dtype)
