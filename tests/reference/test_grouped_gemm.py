# SPDX-License-Identifier: Apache-2.0
"""The grouped product's specification against hand-worked numbers and a loop over rows."""

import math

import pytest
import torch

from fomoe.reference import grouped_gemm


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_each_segment_is_multiplied_by_its_own_matrix():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]])  # two experts, N = 1
    assert grouped_gemm(rows, weight, int32([0, 1, 3])).tolist() == [[1.0], [40.0], [60.0]]


def test_rows_past_the_last_segment_are_never_read_and_come_out_zero():
    rows = torch.tensor([[1.0], [math.nan]], requires_grad=True)
    weight = torch.tensor([[[2.0]]], requires_grad=True)
    out = grouped_gemm(rows, weight, int32([0, 1]))
    out.sum().backward()
    assert out.tolist() == [[2.0], [0.0]]
    assert rows.grad.tolist() == [[2.0], [0.0]]
    assert weight.grad.tolist() == [[[1.0]]]


def test_empty_groups_produce_nothing_and_get_zero_gradient():
    weight = torch.ones(3, 1, 2, requires_grad=True)
    out = grouped_gemm(torch.ones(2, 2), weight, int32([0, 0, 2, 2]))
    out.sum().backward()
    assert out.tolist() == [[2.0], [2.0]]
    assert weight.grad.tolist() == [[[0.0, 0.0]], [[2.0, 2.0]], [[0.0, 0.0]]]


def test_transposed_weights_give_the_same_product():
    rows, weight, offsets = torch.randn(5, 3), torch.randn(2, 4, 3), int32([0, 2, 5])
    transposed = grouped_gemm(rows, weight.mT.contiguous(), offsets, transpose_weight=True)
    assert torch.equal(transposed, grouped_gemm(rows, weight, offsets))


@pytest.mark.parametrize(("num_rows", "num_experts"), [(0, 2), (3, 0), (0, 0)])
def test_no_rows_or_no_experts_give_zeros(num_rows, num_experts):
    out = grouped_gemm(
        torch.ones(num_rows, 3), torch.ones(num_experts, 4, 3), int32([0] * (num_experts + 1))
    )
    assert torch.equal(out, torch.zeros(num_rows, 4))


def test_a_bf16_product_is_summed_in_float32_and_rounded_once():
    rows = torch.tensor([[256.0, 1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    out = grouped_gemm(rows, weight, int32([0, 1]))
    assert out.dtype == torch.bfloat16
    assert out.item() == 258.0


def test_autocast_does_not_lower_the_precision():
    rows, weight, offsets = torch.randn(4, 8), torch.randn(1, 3, 8), int32([0, 4])
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_gemm(rows, weight, offsets)
    assert torch.equal(out, grouped_gemm(rows, weight, offsets))


def test_rows_equal_a_loop_of_dot_products():
    torch.manual_seed(0)
    rows, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    out = grouped_gemm(rows, weight, int32([0, 1, 1, 5]))
    expert_of_row = [0, 2, 2, 2, 2]
    for r, expert in enumerate(expert_of_row):
        for n in range(4):
            dot = sum(rows[r, k] * weight[expert, n, k] for k in range(5))
            torch.testing.assert_close(out[r, n], dot)


def test_gradients_match_finite_differences():
    torch.manual_seed(0)
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    offsets = int32([0, 2, 2, 4])
    assert torch.autograd.gradcheck(lambda r, w: grouped_gemm(r, w, offsets), (rows, weight))
