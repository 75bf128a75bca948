# SPDX-License-Identifier: Apache-2.0
"""Neurons go to experts of exactly equal size: transport plan, rounding, clusters."""

import numpy
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fomoe.convert.clustering import balanced_k_means
from fomoe.convert.rounding import greedy_rounding
from fomoe.convert.sinkhorn import sinkhorn


def scores(seed, num_neurons, num_experts, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_neurons, num_experts, generator=generator, dtype=torch.float64)


def visited(scores_HE, capacity):
    """Greedy rounding word for word: entries from the highest down."""
    num_neurons, num_experts = scores_HE.shape
    expert, free = [-1] * num_neurons, [capacity] * num_experts
    for entry in numpy.argsort(-scores_HE.numpy(), axis=None, kind="stable").tolist():
        neuron, e = divmod(entry, num_experts)
        if expert[neuron] < 0 and free[e] > 0:
            expert[neuron], free[e] = e, free[e] - 1
    return expert


def best_total(scores_HE, capacity):
    """Of the exact solution of the assignment problem."""
    places = scores_HE.repeat_interleave(capacity, dim=1).numpy()
    rows, columns = linear_sum_assignment(places, maximize=True)
    return places[rows, columns].sum()


def total(scores_HE, expert_H):
    return scores_HE.gather(1, expert_H[:, None]).sum().item()


def test_two_neurons_that_want_the_same_place():
    # Neuron 0 wants expert 0 more than neuron 1 does, who has to take expert 1.
    scores_HE = torch.tensor([[3.0, 0.0], [2.0, 1.0]])
    assert greedy_rounding(scores_HE, 1).tolist() == [0, 1]


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_a_plan_has_rows_of_1_and_columns_of_the_capacity(scale):
    for seed in range(5):
        plan = sinkhorn(scores(seed, 24, 4, min(scale, 3.0)), 6, iterations=2000)
        torch.testing.assert_close(plan.sum(1), torch.ones(24, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(0), torch.full((4,), 6.0, dtype=torch.float64))
    sharp = sinkhorn(scores(0, 24, 4, scale), 6)
    assert sharp.isfinite().all()
    torch.testing.assert_close(sharp.sum(1), torch.ones(24, dtype=torch.float64))


def test_a_sharp_plan_is_the_exact_assignment():
    for seed in range(5):
        scores_HE = scores(seed, 12, 3)
        plan = sinkhorn(scores_HE / 0.01, 4, iterations=3000)
        assert total(scores_HE, greedy_rounding(plan, 4)) == pytest.approx(
            best_total(scores_HE, 4), abs=1e-6
        )


def test_a_plan_has_the_gradient_of_finite_differences():
    logits = scores(3, 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 2, iterations=50), (logits,))


@pytest.mark.parametrize("shape", [(12, 3), (40, 8), (64, 2), (5, 5), (7, 1)])
def test_rounding_visits_scores_from_the_highest_down(shape):
    capacity = shape[0] // shape[1]
    for seed in range(20):
        for scores_HE in (scores(seed, *shape), scores(seed, *shape).round()):  # and with ties
            expert_H = greedy_rounding(scores_HE, capacity)
            assert torch.bincount(expert_H, minlength=shape[1]).tolist() == [capacity] * shape[1]
            assert expert_H.tolist() == visited(scores_HE, capacity)


def test_rounding_is_never_better_than_the_exact_assignment_and_often_close():
    ratios = []
    for seed in range(20):
        scores_HE = scores(seed, 24, 4)
        reached, best = total(scores_HE, greedy_rounding(scores_HE, 6)), best_total(scores_HE, 6)
        assert reached <= best + 1e-9
        ratios.append(reached / best)
    assert sum(ratios) / len(ratios) > 0.9


def test_clusters_are_of_equal_size_and_find_what_is_there():
    directions = torch.eye(4).repeat(6, 1) + 0.05 * scores(1, 24, 4).float()
    cluster_H = balanced_k_means(directions, 4, torch.Generator().manual_seed(2), passes=30)
    assert torch.bincount(cluster_H).tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("function", [sinkhorn, greedy_rounding])
def test_experts_that_do_not_hold_every_neuron_are_refused(function):
    with pytest.raises(ValueError, match="expected 4 experts x 6 neurons = 25, got 24"):
        function(torch.zeros(25, 4), 6)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="expected finite scores, got inf or nan"):
        greedy_rounding(torch.full((4, 2), float("nan")), 2)
