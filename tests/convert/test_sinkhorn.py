# SPDX-License-Identifier: Apache-2.0
"""The soft assignment has rows of sum 1 and columns of the experts' size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fomoe.convert.sinkhorn import sinkhorn


def test_a_neuron_that_prefers_one_expert_three_to_one_gets_that_plan():
    # By symmetry the potentials vanish: exp(log 3) and exp(0), scaled to rows of sum 1.
    logits = torch.tensor([[math.log(3), 0], [0, math.log(3)]], dtype=torch.float64)
    expected = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 1), expected)


def test_constants_added_to_rows_and_columns_change_nothing():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = logits + torch.arange(6)[:, None] - 2 * torch.arange(3)
    torch.testing.assert_close(
        sinkhorn(logits, 2, iterations=500), sinkhorn(shifted, 2, iterations=500)
    )


@given(st.integers(2, 6), st.integers(1, 8), st.floats(0.01, 2), st.integers(0, 1000))
def test_rows_sum_to_one_and_columns_to_the_capacity(num_experts, capacity, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_experts * capacity, num_experts)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    plan = sinkhorn(logits, capacity, iterations=300)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(shape[0], dtype=torch.float64))
    columns = torch.full((num_experts,), float(capacity), dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), columns, rtol=1e-3, atol=1e-3)


def test_rows_sum_to_one_however_few_iterations_and_however_sharp_the_logits():
    logits = 1e4 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(logits, 3, iterations=1)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), torch.ones(12))


def test_the_gradient_is_that_of_finite_differences():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 2, iterations=5), logits.requires_grad_())


def test_a_capacity_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected 3 experts x 2 neurons = 7, got 6"):
        sinkhorn(torch.zeros(7, 3), 2)
