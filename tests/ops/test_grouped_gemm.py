# SPDX-License-Identifier: Apache-2.0
"""grouped_gemm against hand-worked segments and the reference."""

import math

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, gradient_of, leaf, name_of

from fomoe import ops, reference

# Expert 0 owns row 0, expert 1 nothing, expert 2 row 1; row 2 is past the end.
OFFSETS = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
ROWS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, math.nan]])
WEIGHT = torch.tensor([[[1.0, 0.0]], [[math.nan, math.nan]], [[10.0, 100.0]]])  # (3, N=1, Kd=2)


def test_each_segment_meets_its_experts_matrix_and_the_tail_is_zero():
    assert ops.grouped_gemm(ROWS, WEIGHT, OFFSETS).tolist() == [[1], [430], [0]]
    transposed = WEIGHT.transpose(1, 2)
    out = ops.grouped_gemm(ROWS, transposed, OFFSETS, transpose_weight=True)
    assert out.tolist() == [[1], [430], [0]]


def test_the_gradients_of_the_tail_and_of_an_empty_expert_are_zero():
    rows, weight = leaf(ROWS), leaf(WEIGHT)
    ops.grouped_gemm(rows, weight, OFFSETS).backward(torch.tensor([[2.0], [3.0], [math.nan]]))
    assert rows.grad.tolist() == [[2, 0], [30, 300], [0, 0]]
    assert weight.grad.tolist() == [[[2, 4]], [[0, 0]], [[9, 12]]]


@pytest.mark.parametrize("transpose_weight", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, transpose_weight):
    offsets, results = sample.routing().offsets, []
    for grouped_gemm in (ops.grouped_gemm, reference.grouped_gemm):
        rows = leaf(sample.rows(dtype, sample.expert_dim if transpose_weight else sample.dim))
        weight = leaf(sample.w1(dtype, "silu"))
        out = grouped_gemm(rows, weight, offsets, transpose_weight=transpose_weight)
        if out.requires_grad:  # the reference's graph is empty without experts
            out.backward(gradient_like(out))
        results.append((out, gradient_of(rows), gradient_of(weight)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)


def test_an_expanded_gradient_and_a_strided_weight_are_accepted():
    offsets = SAMPLE.routing().offsets
    rows = leaf(SAMPLE.rows(torch.float32, SAMPLE.dim))
    wide = torch.randn(SAMPLE.num_local_experts, 5, SAMPLE.dim, 2)
    weight = leaf(wide)
    ops.grouped_gemm(rows, weight[..., 0], offsets).sum().backward()
    expected = leaf(wide)
    reference.grouped_gemm(rows, expected[..., 0], offsets).sum().backward()
    assert_close(weight.grad, expected.grad, torch.float32)


def test_a_segment_longer_than_one_product_equals_the_reference():
    offsets = torch.tensor([0, 700, 1400], dtype=torch.int32)
    rows, weight = torch.randn(1400, 8), torch.randn(2, 6, 8)
    expected = reference.grouped_gemm(rows, weight, offsets)
    assert_close(ops.grouped_gemm(rows, weight, offsets), expected, torch.float32)


def test_gradients_pass_gradcheck():
    offsets = SAMPLE.routing().offsets
    rows, weight = leaf(SAMPLE.rows(torch.float64, 3)), leaf(torch.randn(3, 2, 3).double())
    torch.autograd.gradcheck(lambda r, w: ops.grouped_gemm(r, w, offsets), (rows, weight))
    torch.autograd.gradcheck(
        lambda r, w: ops.grouped_gemm(r, w, offsets, transpose_weight=True),
        (rows, leaf(weight.mT.contiguous())),
    )


def test_a_frozen_weight_gets_no_gradient():
    rows = leaf(ROWS)
    ops.grouped_gemm(rows, WEIGHT, OFFSETS).sum().backward()
    assert rows.grad.tolist() == [[1, 0], [10, 100], [0, 0]]
    assert WEIGHT.grad is None


def test_differentiating_the_weight_gradient_is_refused():
    rows, weight = leaf(ROWS[:2]), leaf(WEIGHT)
    out = ops.grouped_gemm(rows, weight, OFFSETS)
    (d_weight,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_gemm_wgrad: double backward is not supported"):
        d_weight.sum().backward()


def test_mixed_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="grouped_gemm: weight must be bfloat16, got float32"):
        ops.grouped_gemm(ROWS.bfloat16(), WEIGHT, OFFSETS)


def test_shapes_that_do_not_fit_are_named():
    message = r"weight must have shape \(E_local, N, Kd\) with Kd = 2, got \(3, 2, 1\)"
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_gemm(ROWS, WEIGHT.mT, OFFSETS)
    with pytest.raises(RuntimeError, match=r"offsets must have shape \(E_local \+ 1,\) = \(4\)"):
        ops.grouped_gemm(ROWS, WEIGHT, OFFSETS[:3])


@pytest.mark.parametrize(
    ("offsets", "defect"),
    [
        ([1, 1, 1, 2], "begin with 0"),
        ([0, 2, 1, 2], "ascend"),
        ([0, 1, 1, 4], r"end within the rows; there are 3 rows"),
    ],
)
def test_impossible_offsets_are_refused(offsets, defect):
    with pytest.raises(RuntimeError, match=f"grouped_gemm: offsets must {defect}"):
        ops.grouped_gemm(ROWS, WEIGHT, torch.tensor(offsets, dtype=torch.int32))
