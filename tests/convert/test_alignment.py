# SPDX-License-Identifier: Apache-2.0
"""The corrected gradients are the exact difference between on and off."""

import pytest
import torch

from fomoe.convert.dense import DenseLayer, DenseWeights
from fomoe.convert.evaluate import layer_quality
from fomoe.convert.local_alignment import Training, slopes
from fomoe.convert.methods import METHODS, convert_layer

T, D, H, E, K = 7, 5, 12, 4, 2


def layer_of(seed=0, tokens=T, width=H, dim=D):
    generator = torch.Generator().manual_seed(seed)
    gate, up, x = (torch.randn(n, dim, generator=generator) for n in (width, width, tokens))
    down = torch.randn(dim, width, generator=generator)
    weights = DenseWeights(gate.double(), up.double(), down.double())
    return DenseLayer(weights, x.double())


def squared_error(layer, mask_TH):
    dense = layer.hidden @ layer.weights.down.T
    return (dense - (layer.hidden * mask_TH) @ layer.weights.down.T).square().sum()


@pytest.fixture
def chosen_TE():
    rank_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(1)).argsort(1)
    return (rank_TE < K).double()


@pytest.fixture
def expert_H():
    return torch.randperm(H, generator=torch.Generator().manual_seed(2)) % E


def test_an_expert_s_slope_is_the_error_with_it_less_the_error_without(chosen_TE, expert_H):
    layer = layer_of()
    slope = slopes(layer.weights, layer.hidden, expert_H, chosen_TE, corrected=True)
    assert slope.error == pytest.approx(squared_error(layer, chosen_TE[:, expert_H]).item())
    for token in range(T):
        for expert in range(E):
            errors = []
            for state in (1.0, 0.0):
                other = chosen_TE.clone()
                other[token, expert] = state
                errors.append(squared_error(layer, other[:, expert_H]))
            expected = (errors[0] - errors[1]).item()
            assert slope.choice_TE[token, expert].item() == pytest.approx(expected, abs=1e-9)


def test_a_neuron_s_slope_adds_up_what_it_changes_on_the_tokens_of_an_expert(chosen_TE, expert_H):
    layer = layer_of()
    slope = slopes(layer.weights, layer.hidden, expert_H, chosen_TE, corrected=True)
    mask_TH = chosen_TE[:, expert_H]
    for neuron in range(H):
        change_T = []
        for token in range(T):
            errors = []
            for state in (1.0, 0.0):
                other = mask_TH.clone()
                other[token, neuron] = state
                errors.append(squared_error(layer, other))
            change_T.append(errors[0] - errors[1])
        expected_E = torch.stack(change_T) @ chosen_TE
        torch.testing.assert_close(slope.plan_HE[neuron], expected_E)


def test_uncorrected_slopes_are_the_derivative_by_the_mask(chosen_TE, expert_H):
    layer = layer_of()
    choice = chosen_TE.clone().requires_grad_()
    squared_error(layer, choice[:, expert_H]).backward()
    slope = slopes(layer.weights, layer.hidden, expert_H, chosen_TE, corrected=False)
    torch.testing.assert_close(slope.choice_TE, choice.grad)


def quality_of(method, seed=0, steps=40):
    """On a layer with planted experts: neurons of a group answer to the same tokens."""
    generator = torch.Generator().manual_seed(9)
    width, dim, groups = 32, 12, 4
    group_H = torch.randperm(width, generator=generator) % groups
    directions = torch.eye(dim)[:groups]
    gate = 4 * directions[group_H] + 0.3 * torch.randn(width, dim, generator=generator)
    up = torch.randn(width, dim, generator=generator)
    down = torch.randn(dim, width, generator=generator)
    kind_T = torch.randint(0, groups, (1024,), generator=generator)
    x = (
        2 * directions[kind_T]
        - directions.sum(0)
        + 0.5 * torch.randn(1024, dim, generator=generator)
    )
    weights = DenseWeights(gate, up, down)
    training, held_out = DenseLayer(weights, x[:768]), DenseLayer(weights, x[768:])
    settings = Training(steps=steps, batch_size=128, seed=seed)
    result = convert_layer(METHODS[method], training, groups, 1 + (method == "core"), settings)
    assert torch.bincount(result.expert).tolist() == [width // groups] * groups
    top_k = 1 + (method == "core")
    products = held_out.expert_products(result.expert, groups)
    return layer_quality(held_out, result, METHODS[method], top_k, products)


def test_planted_experts_are_found_and_routed_to():
    error = {method: quality_of(method).error for method in ("dot", "random", "prune")}
    assert error["dot"] < 0.2 < error["random"]
    assert error["dot"] < 0.5 * error["prune"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_experts_of_equal_size_and_shares_that_add_up(method):
    quality = quality_of(method, steps=8)
    assert sum(quality.usage) == pytest.approx(1 + (method == "core"))
    assert 0 < quality.error < 1.5
