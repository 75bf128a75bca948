# SPDX-License-Identifier: Apache-2.0
"""The two formulas of a meeting, by hand."""

import pytest
import torch

from fomoe.federation.exchange import Carried, Layout, Piece
from fomoe.federation.exchange import weighted_mean as weighted_mean_into
from fomoe.federation.outer_optimizer import Nesterov


def weighted_mean(values, weights):
    return weighted_mean_into(values, weights, *(torch.empty_like(values[0]) for _ in range(2)))


class OneNumber:
    """The outer optimizer of a model that is one number."""

    def __init__(self, learning_rate, momentum):
        piece = Piece("w", 0, 1, 0, (0,), (0,), "shared")
        layout = Layout([piece], site=0, alignment=1)
        self.chunk = layout.chunks[0]
        self.outer = Nesterov(learning_rate, momentum, Carried(layout, [piece], 1, torch.float32))

    def step(self, difference):
        delta = torch.tensor([difference])
        self.outer.step(self.chunk, delta, torch.empty(1))
        return delta.item()


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
    assert OneNumber(0.7, 0.9).step(0.5) == pytest.approx(0.5 * 1.9 * 0.7)


def test_momentum_changes_at_the_commit_only():
    number = OneNumber(learning_rate=1.0, momentum=0.5)
    number.step(1.0)
    assert number.outer.momentum == {}
    number.step(2.0)  # the first attempt failed, this one counts
    number.outer.commit()
    assert number.outer.momentum["w[0:1]"].item() == 2.0
    assert number.step(1.0) == 1.0 + (2.0 * 0.5 + 1.0) * 0.5
