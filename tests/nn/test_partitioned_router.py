# SPDX-License-Identifier: Apache-2.0
"""Router mode A of FoMoE (arXiv 2606.19025): the residents alone are scored and chosen."""

import math

import pytest
import torch
from telling_layer import choosing, telling_layer

TOKEN = torch.tensor([[9.0, math.log(3), 9.0, 0.0]])  # experts 0 and 2 are its favourites


def test_residents_share_the_weight_that_a_full_router_gives_to_ghosts():
    settings = {"resident": [1, 3], "top_k": 2}
    assert telling_layer(**settings)(TOKEN).tolist() == [[0, 0, 0, 0]]
    y = telling_layer(**settings, router="partitioned")(TOKEN)
    torch.testing.assert_close(y, torch.tensor([[0, 3 / 4, 0, 1 / 4]]))


def test_with_every_expert_resident_both_routers_are_the_same_to_the_bit():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    full, partitioned = (telling_layer(top_k=2, router=r) for r in ("full", "partitioned"))
    assert torch.equal(partitioned(x), full(x))
    assert torch.equal(partitioned.auxiliary_loss, full.auxiliary_loss)


def test_fewer_residents_than_choices_are_all_chosen():
    moe = telling_layer([1, 3], top_k=3, router="partitioned", score="sigmoid", renormalize=True)
    y = moe(torch.zeros(5, 4))
    torch.testing.assert_close(y, torch.tensor([[0, 1 / 2, 0, 1 / 2]]).expand(5, 4))


def test_choices_that_find_no_expert_count_nowhere():
    moe = telling_layer([1, 3], top_k=3, router="partitioned")
    moe(torch.zeros(5, 4))
    statistics = moe.statistics()
    assert statistics.load == (0.0, 0.5, 0.0, 0.5)
    assert statistics.load_entropy == pytest.approx(1.0)
    assert statistics.load_variation == 0.0
    assert statistics.ghost_share == statistics.drop_share == 0.0


def test_the_balance_loss_of_an_even_partitioned_router_is_one():
    moe = telling_layer(
        [1, 3], top_k=3, router="partitioned", balance_loss_coefficient=1.0, z_loss_coefficient=0.0
    )
    moe(torch.zeros(5, 4))
    assert moe.auxiliary_loss.item() == pytest.approx(1.0)


def test_the_balance_loss_of_a_lopsided_partitioned_router_worked_by_hand():
    moe = telling_layer(
        [1, 3], router="partitioned", balance_loss_coefficient=1.0, z_loss_coefficient=0.0
    )
    moe(TOKEN)  # everything on expert 1, of probability 3/4 among 2
    assert moe.auxiliary_loss.item() == pytest.approx(2 * 3 / 4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "unit"])
def test_the_rows_of_foreign_experts_get_exactly_no_gradient(score):
    moe = telling_layer([1, 3], router="partitioned", top_k=2, score=score)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    (moe(x).square().sum() + moe.auxiliary_loss).backward()
    learns = [False, True, False, True]
    assert moe.router.weight.grad.ne(0).any(dim=1).tolist() == learns
    assert moe.router.bias.grad.ne(0).tolist() == learns


def test_a_foreign_row_may_hold_anything_even_nan():
    moe, x = telling_layer([1, 3], router="partitioned", top_k=2), choosing(0, 1, 2, 3)
    y, loss = moe(x), moe.auxiliary_loss
    with torch.no_grad():
        moe.router.weight[0] = math.nan
        moe.router.bias[2] = math.inf
    assert torch.equal(moe(x), y)
    assert torch.equal(moe.auxiliary_loss, loss)


def test_without_residents_nothing_is_chosen_and_nothing_is_lost():
    moe = telling_layer([], router="partitioned", capacity_factor=1.0)
    x = choosing(0, 1).requires_grad_()
    y = moe(x)
    (y.sum() + moe.auxiliary_loss).backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert moe.auxiliary_loss.item() == 0.0
    assert torch.equal(moe.router.weight.grad, torch.zeros(4, 4))
    assert math.isnan(moe.statistics().ghost_share)
