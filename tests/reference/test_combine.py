# SPDX-License-Identifier: Apache-2.0
"""The weighted sum's specification against hand-worked tokens."""

import math

import pytest
import torch

from fomoe.reference import combine, permute, route

# Slots 0..5 choose experts 1, 0 | 1, 2 | 0, 1; expert 2 is a ghost, so slot 3 has no row.
IDS = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=torch.int32)
ROUTING = route(IDS, torch.tensor([0, 1, -1], dtype=torch.int32), 2)
# Rows hold slots 1, 4, 0, 2, 5; the sixth is past the end and must never be read.
ROWS = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [math.nan]])
WEIGHTS = torch.tensor([[0.5, 2.0], [10.0, math.nan], [1.0, -1.0]])


def test_tokens_are_weighted_sums_of_their_resident_rows():
    assert combine(ROWS, WEIGHTS, ROUTING).tolist() == [
        [0.5 * 3.0 + 2.0 * 1.0],
        [10.0 * 4.0],
        [1.0 * 2.0 - 1.0 * 5.0],
    ]


def test_without_weights_every_row_counts_once():
    assert combine(ROWS, None, ROUTING).tolist() == [[4.0], [4.0], [7.0]]


def test_gradients_of_ghosts_and_of_the_tail_are_zero():
    rows, weights = ROWS.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
    combine(rows, weights, ROUTING).backward(torch.tensor([[1.0], [2.0], [3.0]]))
    assert rows.grad.flatten().tolist() == [2.0, 3.0, 0.5, 20.0, -3.0, 0.0]
    assert weights.grad.tolist() == [[3.0, 1.0], [8.0, 0.0], [6.0, 15.0]]


def test_a_bf16_sum_is_rounded_once():
    # In bf16 256 + 1 + 1 stays 256 when rounded at each step; in float32 it is 258.
    routing = route(
        torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.arange(3, dtype=torch.int32), 3
    )
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    y = combine(rows, torch.ones(1, 3), routing)
    assert y.dtype == torch.bfloat16
    assert y.item() == 258.0


def test_combine_without_weights_undoes_permute_up_to_the_number_of_rows():
    x = torch.randn(3, 4)
    assert torch.equal(
        combine(permute(x, ROUTING), None, ROUTING), x * torch.tensor([[2], [1], [2]])
    )


def test_no_tokens_give_an_empty_sum():
    routing = route(torch.empty(0, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)
    assert combine(torch.empty(0, 4), torch.empty(0, 2), routing).shape == (0, 4)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_match_finite_differences(weighted):
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, ROUTING), (rows, weights))
