# SPDX-License-Identifier: Apache-2.0
"""A limit on how many tokens an expert may serve: the prices that hold it, and routers under it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from fomoe.convert.local_alignment import Training
from fomoe.convert.methods import METHODS, convert_layer
from fomoe.convert.router import Choice, RouterWeights, limited, limiting_prices
from fomoe.convert.settings import Conversion
from fomoe.errors import UserError

from .planted import planted_layer


def skewed_scores(num_tokens, num_experts, seed):
    """Scores that nearly every token would take the same experts by."""
    generator = torch.Generator().manual_seed(seed)
    popularity = 3 * torch.randn(num_experts, generator=generator)
    return torch.randn(num_tokens, num_experts, generator=generator) + popularity


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("max_load", [1.0, 1.5])
def test_prices_keep_every_expert_within_its_load(top_k, max_load):
    scores = skewed_scores(600, 6, seed=top_k)
    assert Choice(top_k)(scores).mean(0).max() > max_load * top_k / 6 + 0.02
    prices = limiting_prices(scores, top_k, max_load)
    usage = Choice(top_k)(scores - prices).mean(0)
    assert usage.max() <= 1.02 * max_load * top_k / 6
    assert (prices >= 0).all()


def test_what_is_chosen_at_these_prices_is_the_best_assignment_within_the_loads():
    scores = skewed_scores(120, 4, seed=3)
    prices = limiting_prices(scores, 1, 1.5)
    chosen = Choice(1)(scores - prices)
    seats = scores.repeat_interleave(45, 1).numpy()  # 1.5 x 120 / 4 for each expert
    best = seats[linear_sum_assignment(seats, maximize=True)].sum()
    np.testing.assert_allclose((chosen * scores).sum(), best, rtol=0.01)


def test_a_load_that_nothing_exceeds_costs_nothing():
    scores = torch.eye(4).repeat(25, 1)
    assert limiting_prices(scores, 1, 1.0).tolist() == [0] * 4
    assert limiting_prices(skewed_scores(50, 4, seed=0), 2, 2.0).tolist() == [0] * 4
    assert limiting_prices(skewed_scores(50, 4, seed=0), 4, 1.0).tolist() == [0] * 4


def test_a_routers_bias_is_lowered_but_not_that_of_experts_that_are_always_on():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator)
    router = RouterWeights(torch.randn(5, 8, generator=generator), torch.tensor([9.0, 8, 0, 0, 0]))
    choice = Choice(top_k=2, always_on=1, max_load=1.2)
    after = limited(router, inputs, choice)
    chosen = choice(F.linear(inputs, *after))
    assert after.bias[0] == 9
    assert after.bias[1] < 8
    assert chosen[:, 1:].mean(0).max() <= 1.2 / 4 + 0.01
    assert limited(router, inputs, Choice(top_k=2, always_on=1)) is router


@pytest.mark.parametrize("method", ["dot", "tiers"])
def test_a_layer_that_one_expert_would_serve_alone_is_shared_out(method):
    layer, _ = planted_layer()
    layer.weights.down[:, layer.weights.gate[:, 0] > 0] *= 10  # of one group
    usage = {}
    for max_load in (None, 1.25):
        training = Training(steps=40, batch_size=128, router_rate=0.03, max_load=max_load)
        result = convert_layer(METHODS[method], layer, 4, 2, training)
        chosen = Choice(2)(F.linear(layer.inputs, *result.router))
        usage[max_load] = chosen.mean(0).max()
    assert usage[1.25] <= 1.25 * 2 / 4 + 0.01 < usage[None]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_load": 0.5}, "--max-load: expected at least 1, got 0.5"),
        ({"max_load": float("nan")}, "--max-load: expected at least 1, got nan"),
        ({"max_load": 2.0, "method": "prune"}, "--max-load: method prune has no router"),
    ],
)
def test_loads_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        Conversion(**settings)
