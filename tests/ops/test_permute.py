# SPDX-License-Identifier: Apache-2.0
"""permute against a hand-worked routing and the reference."""

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, leaf, name_of

from fomoe import ops, reference

# Slots 0..3 choose experts 1, 0 | 2, 1; expert 2 is a ghost. Rows hold slots 1, 0, 3.
IDS = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
ROUTING = ops.route(IDS, torch.tensor([0, 1, -1], dtype=torch.int32), 2)


def test_rows_are_tokens_grouped_by_expert_and_the_tail_is_zero():
    x = leaf(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    rows = ops.permute(x, ROUTING)
    assert rows.tolist() == [[1, 2], [1, 2], [3, 4], [0, 0]]
    rows.backward(torch.tensor([[1.0, 1], [10, 10], [100, 100], [1000, 1000]]))
    assert x.grad.tolist() == [[11, 11], [100, 100]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_rows_equal_the_reference_to_the_bit_and_gradients_closely(sample, dtype):
    x, x_reference = leaf(sample.x(dtype)), leaf(sample.x(dtype))
    routing = sample.routing()
    rows, expected = ops.permute(x, routing), reference.permute(x_reference, routing)
    assert torch.equal(rows, expected)
    rows.backward(gradient_like(rows))
    expected.backward(gradient_like(rows))
    assert_close(x.grad, x_reference.grad, dtype)


def test_an_expanded_gradient_is_accepted():
    x = leaf(SAMPLE.x(torch.float32))
    ops.permute(x, SAMPLE.routing()).sum().backward()
    executed = (SAMPLE.routing().slot_to_row >= 0).sum(1, keepdim=True)
    assert torch.equal(x.grad, executed.expand_as(x).float())


def test_gradients_pass_gradcheck_to_the_second_order():
    x, routing = leaf(SAMPLE.x(torch.float64)[:, :3]), SAMPLE.routing()
    torch.autograd.gradcheck(lambda x: ops.permute(x, routing), x)
    torch.autograd.gradgradcheck(lambda x: ops.permute(x, routing), x)


def test_a_routing_for_other_tokens_is_refused():
    with pytest.raises(RuntimeError, match=r"permute: x must have shape \(T, D\) = \(2, any\)"):
        ops.permute(torch.zeros(3, 4), ROUTING)


def test_a_routing_that_points_outside_the_rows_is_refused():
    broken = ROUTING._replace(row_to_slot=torch.tensor([1, 0, 9, -1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"row_to_slot must be in \[0, T\*K\) before offsets"):
        ops.permute(torch.zeros(2, 4), broken)


def test_other_dtypes_are_refused():
    with pytest.raises(
        RuntimeError, match=r"x must be float64, float32, bfloat16 or float16, got int32"
    ):
        ops.permute(torch.zeros(2, 4, dtype=torch.int32), ROUTING)
