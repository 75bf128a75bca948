# SPDX-License-Identifier: Apache-2.0
"""Router statistics against hand-worked counts."""

import math

import pytest
import torch

from fomoe.nn import MoE, MoEConfig


def layer(resident=None, num_experts=4, top_k=1, router="full") -> MoE:
    """A router that sends the i-th unit vector to expert i."""
    config = MoEConfig(dim=4, expert_dim=2, num_experts=num_experts, top_k=top_k, router=router)
    moe = MoE(config, resident)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4)[:num_experts])
    return moe


def test_statistics_of_a_hand_worked_batch():
    moe = layer(resident=[0, 2])
    moe(torch.eye(4)[[0, 0, 1, 3]])  # loads 1/2, 1/4, 0, 1/4; experts 1 and 3 are ghosts
    statistics = moe.statistics()

    assert statistics.load == (0.5, 0.25, 0.0, 0.25)
    assert statistics.load_entropy == pytest.approx(1.5 * math.log(2) / math.log(4))
    # Deviations 1/4, 0, -1/4, 0 from the mean 1/4: variance 1/32.
    assert statistics.load_variation == pytest.approx(math.sqrt(1 / 32) / (1 / 4))
    assert statistics.dead_experts == 1  # expert 2, resident or not
    assert statistics.ghost_share == 0.5
    assert (statistics.num_choices, statistics.num_candidates, statistics.num_residents) == (
        4,
        4,
        2,
    )


def test_a_uniform_load_has_entropy_one_and_no_variation():
    moe = layer()
    moe(torch.eye(4))
    assert moe.statistics().load_entropy == pytest.approx(1.0)
    assert moe.statistics().load_variation == 0.0
    assert moe.statistics().ghost_share == 0.0


def test_a_collapsed_router_has_entropy_zero():
    moe = layer()
    moe(torch.eye(4)[[2, 2, 2]])
    assert moe.statistics().load == (0.0, 0.0, 1.0, 0.0)
    assert moe.statistics().load_entropy == 0.0
    assert moe.statistics().dead_experts == 3


def test_counts_add_up_over_forwards_until_reset():
    moe = layer()
    moe(torch.eye(4)[[0]])
    with torch.no_grad():
        moe(torch.eye(4)[[1]])
    assert moe.statistics().load == (0.5, 0.5, 0.0, 0.0)
    assert (moe.statistics().num_choices, moe.statistics().dead_experts) == (2, 2)
    moe.reset_statistics()
    moe(torch.eye(4)[[3]])
    assert moe.statistics().load == (0.0, 0.0, 0.0, 1.0)


def test_before_the_first_token_everything_is_nan():
    statistics = layer().statistics()
    assert all(math.isnan(share) for share in statistics.load)
    assert math.isnan(statistics.load_entropy)
    assert math.isnan(statistics.load_variation)
    assert math.isnan(statistics.ghost_share)
    assert (statistics.num_choices, statistics.dead_experts) == (0, 4)


def test_a_single_expert_is_perfectly_even():
    moe = layer(num_experts=1)
    moe(torch.eye(4))
    assert moe.statistics().load_entropy == 1.0


def test_an_expert_a_partitioned_router_cannot_choose_is_not_dead():
    moe = layer(resident=[1, 3], router="partitioned")
    moe(torch.eye(4)[[1, 1]])
    statistics = moe.statistics()
    assert statistics.dead_experts == 1  # expert 3; 0 and 2 are no candidates
    assert (statistics.num_candidates, statistics.num_residents) == (2, 2)


def test_statistics_are_no_part_of_the_state():
    moe = layer()
    moe(torch.eye(4))
    assert not any("count" in name for name in moe.state_dict())
