# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.grouped_gemm``. R rows, Kd inner width, N outer width."""

import torch
from torch import Tensor


def grouped_gemm(
    rows: Tensor, weight: Tensor, offsets: Tensor, *, transpose_weight: bool = False
) -> Tensor:
    """out[r] = rows[r] @ weight[e]^T for the rows r of expert e; rows past offsets[-1] are zero.

    Parameters
    ----------
    rows : Tensor, (R, Kd), float64 | float32 | bfloat16 | float16
        Rows past offsets[-1] are never read.
    weight : Tensor, (E_local, N, Kd), or (E_local, Kd, N) if ``transpose_weight``; dtype of rows
    offsets : Tensor, (E_local + 1,), int32
        Expert e owns rows offsets[e] up to offsets[e + 1].
    transpose_weight : bool
        out[r] = rows[r] @ weight[e] instead.

    Returns
    -------
    Tensor, (R, N), dtype of rows
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    matrices = weight.to(wide) if transpose_weight else weight.to(wide).transpose(1, 2)
    bounds = offsets.tolist()
    # Autocast would turn these products into bf16 ones; an op computes in the dtype it is given.
    with torch.autocast(rows.device.type, enabled=False):
        outputs = [
            rows[bounds[e] : bounds[e + 1]].to(wide) @ matrices[e] for e in range(weight.shape[0])
        ]
    tail = rows.new_zeros(rows.shape[0] - bounds[-1], matrices.shape[2], dtype=wide)
    return torch.cat([*outputs, tail]).to(rows.dtype)
