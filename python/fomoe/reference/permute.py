# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.permute``. T tokens, D width, K choices, R = T * K rows."""

import torch
from torch import Tensor

from fomoe.ops.types import Routing


def permute(x: Tensor, routing: Routing) -> Tensor:
    """rows[r] = x[row_to_slot[r] // K]; rows past offsets[-1] are zero.

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
    routing : Routing

    Returns
    -------
    Tensor, (R, D), dtype of x
    """
    num_tokens, top_k = routing.slot_to_row.shape
    # By way of slots, so that the gradient of a token is one sum over K, rounded once.
    slots = x.unsqueeze(1).expand(num_tokens, top_k, -1).flatten(0, 1)
    rows = slots[routing.row_to_slot.clamp(min=0).long()]
    has_slot = (routing.row_to_slot >= 0).unsqueeze(1)
    return torch.where(has_slot, rows, 0.0)
