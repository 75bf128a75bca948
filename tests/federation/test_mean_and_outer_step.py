# SPDX-License-Identifier: Apache-2.0
"""The two formulas of a meeting, by hand."""

import pytest
import torch

from fomoe.federation.exchange import weighted_mean
from fomoe.federation.outer_optimizer import Nesterov


def test_the_mean_is_weighted_by_tokens():
    values = [torch.tensor([1.0, 8.0]), torch.tensor([2.0, 0.0]), torch.tensor([4.0, -8.0])]
    # (1*1 + 2*2 + 5*4) / 8 and (1*8 + 2*0 - 5*8) / 8
    assert weighted_mean(values, [1.0, 2.0, 5.0]).tolist() == [25 / 8, -4.0]


def test_the_mean_sums_in_the_given_order_and_divides_once():
    values = [torch.arange(1, 1000) / divisor for divisor in (3.0, 7.0, 11.0)]
    weights = [3.0, 7.0, 1.0]
    expected = ((values[0] * 3.0 + values[1] * 7.0) + values[2] * 1.0) / 11.0
    assert torch.equal(weighted_mean(values, weights), expected)
    backwards = weighted_mean(values[::-1], weights[::-1])
    assert not torch.equal(backwards, expected)


def test_a_single_contribution_is_a_copy_to_the_bit():
    value = torch.arange(1, 1000) / 7
    mean = weighted_mean([value], [41.0])
    assert torch.equal(mean, value)
    assert not torch.equal(value * 41.0 / 41.0, value), "or this test shows nothing"
    assert mean.data_ptr() != value.data_ptr()


def test_fp64_is_averaged_in_fp64():
    values = [torch.tensor([1 / 3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    assert weighted_mean(values, [1.0, 1.0]).item() == (1 / 3) / 2


def test_the_first_nesterov_step_is_a_third_longer_than_the_displacement():
    outer = Nesterov(learning_rate=0.7, momentum=0.9)
    assert outer.step("w", torch.tensor([0.5])).item() == pytest.approx(0.5 * 1.9 * 0.7)


def test_momentum_changes_at_the_commit_only():
    outer = Nesterov(learning_rate=1.0, momentum=0.5)
    outer.step("w", torch.tensor([1.0]))
    assert outer.momentum == {}
    outer.step("w", torch.tensor([2.0]))  # the first attempt failed, this one counts
    outer.commit()
    assert outer.momentum["w"].item() == 2.0
    assert outer.step("w", torch.tensor([1.0])).item() == 1.0 + (2.0 * 0.5 + 1.0) * 0.5
