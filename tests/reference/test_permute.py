# SPDX-License-Identifier: Apache-2.0
"""The permutation's specification against hand-worked rows."""

import pytest
import torch

from fomoe.reference import permute, route

# Slots 0..5 choose experts 1, 0 | 1, 2 | 0, 1; expert 2 is a ghost, so slot 3 has no row.
IDS = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=torch.int32)
ROUTING = route(IDS, torch.tensor([0, 1, -1], dtype=torch.int32), 2)


def test_rows_are_token_copies_by_expert_and_the_tail_is_zero():
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    # Expert 0 has slots 1, 4 (tokens 0, 2), expert 1 slots 0, 2, 5 (tokens 0, 1, 2).
    tokens = [1.0, 3.0, 1.0, 2.0, 3.0, 0.0]
    assert permute(x, ROUTING).tolist() == [[token, 10 * token] for token in tokens]


def test_the_gradient_of_a_token_sums_its_rows_and_ignores_the_tail():
    x = torch.zeros(3, 1, requires_grad=True)
    grad_rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [float("nan")]])
    permute(x, ROUTING).backward(grad_rows)
    assert x.grad.tolist() == [[1.0 + 4.0], [8.0], [2.0 + 16.0]]


def test_a_bf16_gradient_is_rounded_once():
    # In bf16 256 + 1 + 1 stays 256 when rounded at each step; in float32 it is 258.
    routing = route(
        torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.arange(3, dtype=torch.int32), 3
    )
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, routing).backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 258.0


def test_no_tokens_give_no_rows():
    routing = route(torch.empty(0, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)
    assert permute(torch.empty(0, 4), routing).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_the_dtype(dtype):
    assert permute(torch.ones(3, 2, dtype=dtype), ROUTING).dtype == dtype


def test_gradient_matches_finite_differences():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, ROUTING), x)
