# SPDX-License-Identifier: Apache-2.0
"""combine: every token sums the rows that its experts made of it, weighted."""

from typing import Any

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import FLOATS, check_devices, check_routing, check_tensor, sum_dtype
from fomoe.ops.types import Routing


def combine(rows: Tensor, weights: Tensor | None, routing: Routing) -> Tensor:
    """``y[t] = sum_k weights[t, k] * rows[slot_to_row[t, k]]``, k ascending, rounded once.

    A ghost (slot_to_row -1) adds nothing, whatever its weight, and its weight gets a zero gradient.
    Rows that no slot points to are never read.

    Parameters
    ----------
    rows : Tensor, (T*K, D), float64 | float32 | bfloat16 | float16
        Any strides; a non-contiguous input is copied.
    weights : Tensor, (T, K), float64 for float64 rows, else float32; or None for ones
    routing : Routing
        From :func:`fomoe.ops.route`.

    Returns
    -------
    Tensor, (T, D), dtype of rows
        Accumulated in the dtype of weights. Differentiable in rows and weights; rows past
        offsets[-1] get a zero gradient. Deterministic to the bit, for any number of threads.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, or the routing is not one that route makes; the message
        names op, argument, expected and got.
    """
    result: Tensor = torch.ops.fomoe.combine(rows, weights, *routing)
    return result


@torch.library.register_fake("fomoe::combine")
def _fake(
    rows: Tensor,
    weights: Tensor | None,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
) -> Tensor:
    check_devices(
        "combine",
        {
            "rows": rows,
            "weights": weights,
            "slot_to_row": slot_to_row,
            "row_to_slot": row_to_slot,
            "offsets": offsets,
        },
    )
    num_tokens, top_k, _ = check_routing("combine", slot_to_row, row_to_slot, offsets)
    check_tensor("combine", "rows", rows, FLOATS, (num_tokens * top_k, None), "(T*K, D)")
    if weights is not None:
        dtypes = (sum_dtype(rows.dtype),)
        check_tensor("combine", "weights", weights, dtypes, (num_tokens, top_k), "(T, K)")
    return rows.new_empty(slot_to_row.shape[0], rows.shape[1])


@torch.library.register_fake("fomoe::combine_backward")
def _fake_backward(
    grad_y: Tensor,
    rows: Tensor,
    weights: Tensor,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    op = "combine_backward"
    tensors = {
        "rows": rows,
        "grad_y": grad_y,
        "weights": weights,
        "slot_to_row": slot_to_row,
        "row_to_slot": row_to_slot,
        "offsets": offsets,
    }
    check_devices(op, tensors)
    num_tokens, top_k, _ = check_routing(op, slot_to_row, row_to_slot, offsets)
    check_tensor(op, "rows", rows, FLOATS, (num_tokens * top_k, None), "(T*K, D)")
    check_tensor(op, "grad_y", grad_y, (rows.dtype,), (num_tokens, rows.shape[1]), "(T, D)")
    dtypes = (sum_dtype(rows.dtype),)
    check_tensor(op, "weights", weights, dtypes, (num_tokens, top_k), "(T, K)")
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    rows, weights, *routing = inputs
    # Without weights the gradient is a permute of grad_y: the rows need not be kept.
    ctx.save_for_backward(*([rows, weights] if weights is not None else []), *routing)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    *operands, slot_to_row, row_to_slot, offsets = ctx.saved_tensors
    routing = (slot_to_row, row_to_slot, offsets)
    if not operands:
        return torch.ops.fomoe.permute(grad_y, *routing), None, None, None, None
    d_rows, d_weights = torch.ops.fomoe.combine_backward(grad_y, *operands, *routing)
    return d_rows, d_weights, None, None, None


torch.library.register_autograd("fomoe::combine", _backward, setup_context=_setup_context)
refuse_double_backward("combine_backward")
