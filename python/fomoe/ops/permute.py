# SPDX-License-Identifier: Apache-2.0
"""permute: copy every token once per expert that executes it, grouped by expert."""

from typing import Any

import torch
from torch import Tensor

from fomoe.ops._checks import FLOATS, check_devices, check_routing, check_tensor
from fomoe.ops.types import Routing


def permute(x: Tensor, routing: Routing) -> Tensor:
    """``rows[r] = x[row_to_slot[r] // K]``; rows past the last executed row are zero.

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
        Token rows. Any strides; a non-contiguous input is copied.
    routing : Routing
        From :func:`fomoe.ops.route`, for T tokens and K experts per token.

    Returns
    -------
    Tensor, (T*K, D), dtype of x
        Rows in the order "by expert, then by slot". Differentiable in x; the gradient of a token
        sums its rows in ascending k. Deterministic to the bit.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, or the routing is not one that route makes; the message
        names op, argument, expected and got.
    """
    result: Tensor = torch.ops.fomoe.permute(x, *routing)
    return result


@torch.library.register_fake("fomoe::permute")
def _fake(x: Tensor, slot_to_row: Tensor, row_to_slot: Tensor, offsets: Tensor) -> Tensor:
    check_devices(
        "permute",
        {"x": x, "slot_to_row": slot_to_row, "row_to_slot": row_to_slot, "offsets": offsets},
    )
    num_tokens, _, _ = check_routing("permute", slot_to_row, row_to_slot, offsets)
    check_tensor("permute", "x", x, FLOATS, (num_tokens, None), "(T, D)")
    return x.new_empty(row_to_slot.shape[0], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fomoe.combine(grad_rows, None, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("fomoe::permute", _backward, setup_context=_setup_context)
