# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm: the rows of every expert times that expert's matrix."""

from typing import Any

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import FLOATS, check_devices, check_offsets, check_tensor


def grouped_gemm(
    rows: Tensor, weight: Tensor, offsets: Tensor, *, transpose_weight: bool = False
) -> Tensor:
    """``out[r] = rows[r] @ weight[e]^T`` for the rows r of expert e; zero past offsets[-1].

    Parameters
    ----------
    rows : Tensor, (R, Kd), float64 | float32 | bfloat16 | float16
        Rows past offsets[-1] are never read. Any strides; a non-contiguous input is copied.
    weight : Tensor, (E_local, N, Kd), or (E_local, Kd, N) if ``transpose_weight``; dtype of rows
        Copied only if neither of its last two axes is dense.
    offsets : Tensor, (E_local + 1,), int32
        Expert e owns rows offsets[e] up to offsets[e + 1]; it may own none.
    transpose_weight : bool
        ``out[r] = rows[r] @ weight[e]`` instead.

    Returns
    -------
    Tensor, (R, N), dtype of rows
        Differentiable in rows and weight. An expert without rows gets an exactly zero weight
        gradient. As deterministic as torch.mm for a fixed number of threads.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, or offsets do not ascend from 0 to at most R; the
        message names op, argument, expected and got.
    """
    result: Tensor = torch.ops.fomoe.grouped_gemm(rows, weight, offsets, transpose_weight)
    return result


@torch.library.register_fake("fomoe::grouped_gemm")
def _fake(rows: Tensor, weight: Tensor, offsets: Tensor, transpose_weight: bool) -> Tensor:
    op = "grouped_gemm"
    check_devices(op, {"rows": rows, "weight": weight, "offsets": offsets})
    check_tensor(op, "rows", rows, FLOATS, (None, None), "(R, Kd)")
    num_local_experts, inner = check_offsets(op, offsets), rows.shape[1]
    shape = (num_local_experts, *((inner, None) if transpose_weight else (None, inner)))
    legend = "(E_local, Kd, N)" if transpose_weight else "(E_local, N, Kd)"
    check_tensor(op, "weight", weight, (rows.dtype,), shape, legend)
    return rows.new_empty(rows.shape[0], weight.shape[2 if transpose_weight else 1])


@torch.library.register_fake("fomoe::grouped_gemm_wgrad")
def _fake_wgrad(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    op = "grouped_gemm_wgrad"
    check_devices(op, {"left": left, "right": right, "offsets": offsets})
    check_tensor(op, "left", left, FLOATS, (None, None), "(R, M)")
    check_tensor(op, "right", right, (left.dtype,), (left.shape[0], None), "(R, N)")
    check_offsets(op, offsets)
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, offsets, ctx.transpose_weight = inputs
    ctx.save_for_backward(rows, weight, offsets)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    d_rows = d_weight = None
    if ctx.needs_input_grad[0]:
        d_rows = torch.ops.fomoe.grouped_gemm(grad_out, weight, offsets, not ctx.transpose_weight)
    if ctx.needs_input_grad[1]:
        left, right = (rows, grad_out) if ctx.transpose_weight else (grad_out, rows)
        d_weight = torch.ops.fomoe.grouped_gemm_wgrad(left, right, offsets)
    return d_rows, d_weight, None, None


torch.library.register_autograd("fomoe::grouped_gemm", _backward, setup_context=_setup_context)
refuse_double_backward("grouped_gemm_wgrad")
