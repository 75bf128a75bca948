# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.combine``. T tokens, D width, K choices, R = T * K rows."""

import torch
from torch import Tensor

from fomoe.ops.types import Routing


def combine(rows: Tensor, weights: Tensor | None, routing: Routing) -> Tensor:
    """y[t] = sum_k weights[t, k] * rows[slot_to_row[t, k]], k ascending, rounded once.

    A ghost (slot_to_row -1) adds nothing, whatever its weight, and gets a zero weight gradient.

    Parameters
    ----------
    rows : Tensor, (R, D), float64 | float32 | bfloat16 | float16
    weights : Tensor, (T, K), accumulation dtype of rows, or None for ones
    routing : Routing

    Returns
    -------
    Tensor, (T, D), dtype of rows
    """
    num_tokens, top_k = routing.slot_to_row.shape
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    y = wide.new_zeros(num_tokens, rows.shape[1])
    for k in range(top_k):
        row = routing.slot_to_row[:, k]
        is_resident = (row >= 0).unsqueeze(1)
        term = torch.where(is_resident, wide[row.clamp(min=0).long()], 0.0)
        if weights is not None:
            term = term * torch.where(is_resident, weights[:, k : k + 1], 0.0)
        y = y + term
    return y.to(rows.dtype)
