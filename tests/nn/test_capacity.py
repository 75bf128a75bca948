# SPDX-License-Identifier: Apache-2.0
"""An expert takes as many tokens as its capacity allows, the earlier ones."""

import pytest
import torch
from telling_layer import choosing, telling_layer

UNIT = {"score": "unit"}


def test_late_tokens_of_a_full_expert_pass_through_nothing():
    moe = telling_layer(**UNIT, capacity_factor=1.0)  # capacity 4 * 1 / 4 = 1
    y = moe(choosing(0, 0, 2, 0))
    assert y.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_who_comes_first_is_the_order_of_the_tokens():
    moe = telling_layer(**UNIT, capacity_factor=1.0, top_k=2)  # capacity 2
    first, second = torch.tensor([2.0, 1, 0, 0]), torch.tensor([1.0, 2, 0, 0])
    y = moe(torch.stack([second, first, second, first]))
    assert y.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_an_even_load_fits_into_a_factor_of_one():
    moe = telling_layer(**UNIT, capacity_factor=1.0)
    moe(choosing(0, 1, 2, 3, 3, 2, 1, 0))
    assert moe.statistics().drop_share == 0.0


@pytest.mark.parametrize(
    ("factor", "num_tokens", "capacity"),
    [
        (1.0, 8, 2),
        (1.0, 9, 3),  # 9 / 4, rounded up
        (1.25, 8, 3),  # 2.5
        (0.01, 8, 1),
        (2.2, 100, 55),  # in floats 2.2 * 100 / 4 is a little more than 55
        (1 / 3, 12, 1),
        (100, 8, 8),
        (1.0, 0, 0),
    ],
)
def test_the_capacity_is_the_factor_times_the_even_load_rounded_up(factor, num_tokens, capacity):
    moe = telling_layer(**UNIT, capacity_factor=factor)
    y = moe(choosing(*[2] * num_tokens))
    assert y.sum().item() == capacity


def test_the_even_load_of_a_partitioned_router_is_over_its_residents():
    moe = telling_layer([1, 3], **UNIT, router="partitioned", capacity_factor=1.0, top_k=3)
    y = moe(choosing(1, 1, 1, 1))  # everyone passes through both: 4 * 2 / 2 each
    assert y.tolist() == [[0, 1, 0, 1]] * 4


def test_statistics_tell_drops_from_ghosts():
    moe = telling_layer([0, 1], **UNIT, capacity_factor=1.0)  # capacity 2
    moe(choosing(0, 0, 0, 0, 0, 1, 3, 3))
    statistics = moe.statistics()
    assert statistics.load == (5 / 8, 1 / 8, 0.0, 2 / 8)  # what was chosen, kept or not
    assert statistics.drop_share == 3 / 8
    assert statistics.ghost_share == 2 / 8
    moe.reset_statistics()
    moe(choosing(0))
    assert moe.statistics().drop_share == 0.0


def test_a_dropped_token_teaches_neither_expert_nor_router():
    moe = telling_layer(score="sigmoid", capacity_factor=1.0)
    x = torch.stack([torch.tensor([1.0, 0, 0, 0])] * 4).requires_grad_()
    moe(x).sum().backward()
    assert x.grad.abs().sum(1).ne(0).tolist() == [True, False, False, False]
    assert moe.experts.b2.grad[0, 0].item() == pytest.approx(torch.tensor(1.0).sigmoid().item())
