# SPDX-License-Identifier: Apache-2.0
"""Tokens are drawn from the distribution that temperature and nucleus leave."""

import math

import pytest
import torch

from fomoe.generate import Sampler, Sampling


def frequencies(sampling, probabilities, draws=4000):
    logits = torch.tensor(probabilities).log().repeat(draws, 1)
    chosen = Sampler(sampling, draws)(logits)
    return torch.bincount(torch.tensor(chosen), minlength=len(probabilities)) / draws


def test_temperature_0_takes_the_first_of_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]])
    assert Sampler(Sampling(), 2)(logits) == [1, 0]


def test_temperature_1_draws_by_probability():
    torch.testing.assert_close(
        frequencies(Sampling(temperature=1.0), [0.5, 0.2, 0.3]),
        torch.tensor([0.5, 0.2, 0.3]),
        rtol=0,
        atol=0.03,
    )


def test_a_temperature_of_a_half_squares_probabilities():
    squares = torch.tensor([0.25, 0.04, 0.09])
    torch.testing.assert_close(
        frequencies(Sampling(temperature=0.5), [0.5, 0.2, 0.3]),
        squares / squares.sum(),
        rtol=0,
        atol=0.03,
    )


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    # 0.5 is not enough for 0.6, 0.5 + 0.3 is.
    drawn = frequencies(Sampling(temperature=1.0, top_p=0.6), [0.5, 0.2, 0.3])
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.0, 0.375]), rtol=0, atol=0.03)
    assert drawn[1] == 0
    assert frequencies(Sampling(temperature=1.0, top_p=0.5), [0.5, 0.2, 0.3], 50)[0] == 1


def test_the_seed_decides():
    logits = torch.zeros(1, 1000)
    draws = [Sampler(Sampling(temperature=1.0, seed=seed), 1)(logits) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="logits: expected finite ones, got NaN or an infinity"):
        Sampler(Sampling(), 1)(torch.tensor([[0.0, bad]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"top_p": 1.5}, "top_p: expected at most 1, got 1.5"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
