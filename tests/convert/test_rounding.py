# SPDX-License-Identifier: Apache-2.0
"""Greedy rounding: against visiting the scores one by one, and against the best assignment."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fomoe.convert.rounding import greedy_rounding

small = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))


def test_the_second_neuron_has_to_yield_its_favourite():
    # 0.9: neuron 0 takes expert 0, which is full then; 0.8 of neuron 1 comes too late.
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    assert greedy_rounding(scores, 1).tolist() == [0, 1]


def test_a_neuron_that_is_displaced_displaces_another_in_turn():
    # 0 takes A (9); 1 wanted A (8), takes B (7); 2 wanted B (6), is left with C.
    scores = torch.tensor([[9.0, 0, 0], [8, 7, 0], [0, 6, 1]])
    assert greedy_rounding(scores, 1).tolist() == [0, 1, 2]


def test_equal_scores_go_to_the_lower_neuron_and_the_lower_expert():
    assert greedy_rounding(torch.zeros(6, 3), 2).tolist() == [0, 0, 1, 1, 2, 2]


def one_by_one(scores, capacity):
    num_neurons, num_experts = scores.shape
    expert, room = [-1] * num_neurons, [capacity] * num_experts
    for entry in scores.flatten().argsort(descending=True, stable=True).tolist():
        neuron, candidate = divmod(entry, num_experts)
        if expert[neuron] < 0 and room[candidate] > 0:
            expert[neuron] = candidate
            room[candidate] -= 1
    return expert


@given(small, st.booleans())
def test_it_is_what_visiting_the_scores_from_the_highest_gives(case, with_ties):
    num_experts, capacity, seed = case
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_experts * capacity, num_experts, generator=generator)
    if with_ties:
        scores = (4 * scores).round()
    expert = greedy_rounding(scores, capacity)
    assert expert.tolist() == one_by_one(scores, capacity)
    assert expert.bincount(minlength=num_experts).tolist() == [capacity] * num_experts


@given(small)
def test_its_total_is_at_most_the_best_assignment_and_at_least_half_of_it(case):
    num_experts, capacity, seed = case
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_experts * capacity, num_experts, generator=generator).double()
    greedy = float(scores.gather(1, greedy_rounding(scores, capacity)[:, None]).sum())
    best = best_total(scores, capacity)
    assert best / 2 - 1e-9 <= greedy <= best + 1e-9


@given(small)
def test_a_plan_that_is_nearly_hard_is_rounded_to_the_best_assignment(case):
    num_experts, capacity, seed = case
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_experts * capacity, generator=generator)
    expert = order % num_experts
    noise = 0.4 * torch.rand(len(order), num_experts, generator=generator).double()
    scores = noise + torch.nn.functional.one_hot(expert, num_experts)
    assert greedy_rounding(scores, capacity).tolist() == expert.tolist()
    total = float(scores.gather(1, expert[:, None]).sum())
    assert total == pytest.approx(best_total(scores, capacity))


def best_total(scores, capacity):
    places = np.repeat(scores.numpy(), capacity, axis=1)
    return places[linear_sum_assignment(places, maximize=True)].sum()


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="expected finite scores"):
        greedy_rounding(torch.tensor([[0.0, float("nan")], [0, 0]]), 1)
