# SPDX-License-Identifier: Apache-2.0
"""Gradients against finite differences of the error, and what training reaches."""

import pytest
import torch
import torch.nn.functional as F

from fomoe.convert.local_alignment import Training, align, slopes, train_router
from fomoe.convert.methods import METHODS, convert_layer
from fomoe.convert.router import Choice

from .planted import planted_layer

NUM_EXPERTS = 4


def masked_error(layer, mask_TH):
    """|dense - masked|^2 over all tokens."""
    lost = layer.hidden * (1 - mask_TH)
    return (lost @ layer.weights.down.T).square().sum()


@pytest.fixture
def assigned(layer):
    """Expert of each neuron, and two chosen experts of each token."""
    generator = torch.Generator().manual_seed(1)
    expert = torch.randperm(24, generator=generator) % NUM_EXPERTS
    chosen = Choice(2)(torch.randn(64, NUM_EXPERTS, generator=generator).double())
    return expert, chosen


def test_the_error_is_that_of_the_masked_layer(layer, assigned):
    expert, chosen = assigned
    error = slopes(layer.weights, layer.hidden, expert, chosen, corrected=True).error
    torch.testing.assert_close(error, masked_error(layer, chosen[:, expert]))


def test_a_corrected_slope_of_the_choice_is_the_error_with_the_expert_minus_without(
    layer, assigned
):
    expert, chosen = assigned
    found = slopes(layer.weights, layer.hidden, expert, chosen, corrected=True).choice_TE
    for token, candidate in [(0, 0), (0, 1), (5, 2), (9, 3)]:
        errors = []
        for state in (0, 1):
            changed = chosen.clone()
            changed[token, candidate] = state
            errors.append(masked_error(layer, changed[:, expert]))
        torch.testing.assert_close(found[token, candidate], errors[1] - errors[0])


def test_a_corrected_slope_of_the_plan_sums_on_minus_off_over_the_experts_tokens(layer, assigned):
    expert, chosen = assigned
    found = slopes(layer.weights, layer.hidden, expert, chosen, corrected=True).plan_HE
    mask = chosen[:, expert]
    for neuron, candidate in [(0, 0), (3, 1), (17, 3)]:
        expected = 0
        for token in chosen[:, candidate].nonzero().flatten().tolist():
            on, off = mask.clone(), mask.clone()
            on[token, neuron], off[token, neuron] = 1, 0
            expected += masked_error(layer, on) - masked_error(layer, off)
        torch.testing.assert_close(found[neuron, candidate], expected)


def test_the_literal_slopes_are_the_derivatives_by_the_masks(layer, assigned):
    expert, chosen = assigned
    found = slopes(layer.weights, layer.hidden, expert, chosen, corrected=False)
    plan = F.one_hot(expert, NUM_EXPERTS).double().requires_grad_()
    choice = chosen.clone().requires_grad_()
    masked_error(layer, choice @ plan.T).backward()
    torch.testing.assert_close(found.plan_HE, plan.grad)
    torch.testing.assert_close(found.choice_TE, choice.grad)


def test_the_literal_slope_is_zero_for_an_expert_alone_that_is_on_and_the_corrected_is_not(layer):
    """The one-sidedness that the correction is for: nothing is left out, so nothing is defended."""
    expert, chosen = torch.zeros(24, dtype=torch.int64), torch.ones(64, 1, dtype=torch.float64)
    literal, corrected = (
        slopes(layer.weights, layer.hidden, expert, chosen, corrected=flag).choice_TE[:, 0]
        for flag in (False, True)
    )
    assert (literal == 0).all()
    torch.testing.assert_close(corrected, -layer.output_squares)


def test_products_give_the_error_of_any_choice(layer, assigned):
    expert, chosen = assigned
    products = layer.expert_products(expert, NUM_EXPERTS)
    off = 1 - chosen
    error = torch.einsum("te,tef,tf->", off, products, off)
    torch.testing.assert_close(error, masked_error(layer, chosen[:, expert]))


def test_a_planted_assignment_is_found_from_another_one_and_routed_to():
    layer, group = planted_layer()
    start = group.clone()
    swapped = [int((group == expert).nonzero()[0]) for expert in range(4)]
    start[swapped] = group[swapped].roll(1)  # one neuron of each group is elsewhere
    training = Training(steps=60, batch_size=128, router_rate=0.03)
    expert, router = align(layer, 4, Choice(1), training, start)
    assert torch.equal(expert, group)
    assert error_of(layer, expert, router, Choice(1)) < 0.01


def test_a_router_alone_learns_a_given_assignment():
    layer, group = planted_layer()
    products = layer.expert_products(group, 4)
    training = Training(steps=60, batch_size=128, router_rate=0.03)
    router = train_router(layer, products, Choice(1), training)
    assert error_of(layer, group, router, Choice(1)) < 0.01


def error_of(layer, expert, router, choice):
    chosen = choice(F.linear(layer.inputs, router.weight, router.bias))
    return masked_error(layer, chosen[:, expert]) / layer.output_squares.sum()


@pytest.mark.parametrize("corrected", [True, False])
def test_every_expert_gets_its_share_of_neurons_and_the_same_seed_the_same_bits(layer, corrected):
    training = Training(steps=5, batch_size=16, corrected=corrected)
    first, second = (align(layer, NUM_EXPERTS, Choice(2), training) for _ in range(2))
    assert first.expert.bincount().tolist() == [6] * NUM_EXPERTS
    assert torch.equal(first.expert, second.expert)
    assert torch.equal(first.router.weight, second.router.weight)


def test_dot_starts_with_the_most_important_neurons_in_one_expert_and_the_others_clustered(layer):
    still = Training(steps=1, batch_size=16, affinity_rate=0.0)
    start = convert_layer(METHODS["dot"], layer, NUM_EXPERTS, 1, still).expert
    core = (start == 0).nonzero().flatten()
    assert sorted(core.tolist()) == sorted(layer.importance.topk(6).indices.tolist())
    assert torch.equal(start, convert_layer(METHODS["core"], layer, NUM_EXPERTS, 2, still).expert)
