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
    activation: Literal["swiglu", "silu"] = "swiglu",
) -> Tensor:
    """y[t] = sum_k weights[t, k] * expert(x[t]) over the resident experts token t chose.

    The pre-activation, the activation and each expert's output are rounded to the dtype of x.
    ``silu`` is the FoMoE paper's two-matrix expert (arXiv 2606.19025).

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
    weights : Tensor, (T, K), accumulation dtype of x
    w1 : Tensor, (E_local, 2F, D) for swiglu, gate rows before up rows; (E_local, F, D) for silu
    w2 : Tensor, (E_local, D, F)
    routing : Routing
    activation : "swiglu" for h = silu(gate) * up, "silu" for h = silu(x w1^T)

    Returns
    -------
    Tensor, (T, D), dtype of x

    Raises
    ------
    ValueError
        If ``activation`` is unknown.
    """
    pre_activation = grouped_gemm(permute(x, routing), w1, routing.offsets)
    wide = pre_activation.to(torch.promote_types(x.dtype, torch.float32))
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=1)
        hidden = F.silu(gate) * up
    elif activation == "silu":
        hidden = F.silu(wide)
    else:
        raise ValueError(f"expert_mlp: activation must be 'swiglu' or 'silu', got {activation!r}")
    return combine(grouped_gemm(hidden.to(x.dtype), w2, routing.offsets), weights, routing)
