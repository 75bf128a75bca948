# SPDX-License-Identifier: Apache-2.0
"""Weights, sums and gradients of topk_gate against hand-worked logits and the reference."""

import math

import pytest
import torch
from gate_cases import (
    OPTIONS,
    SCORES,
    SETTINGS,
    assert_equals_the_reference,
    settings_name,
    tensors_for,
)
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, leaf, name_of

from fomoe import ops, reference


def test_softmax_weights_are_the_probabilities_of_the_best_logits():
    # softmax of (0, log 2, log 5) is (1, 2, 5) / 8.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    gate = ops.topk_gate(logits, 2)
    assert gate.ids.tolist() == [[2, 1]]
    assert gate.weights.tolist() == [[pytest.approx(5 / 8), pytest.approx(2 / 8)]]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert gate.z_sum.item() == pytest.approx(math.log(8) ** 2)
    assert gate.counts.tolist() == [0, 1, 1]
    renormalized = ops.topk_gate(logits, 2, renormalize=True, scale=3.0)
    assert renormalized.weights.tolist() == [[pytest.approx(15 / 7), pytest.approx(6 / 7)]]


def test_sigmoid_weights_stand_alone_and_probabilities_are_their_shares():
    # sigmoid of (0, log 3) is (1/2, 3/4).
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    gate = ops.topk_gate(logits, 1, score="sigmoid")
    assert gate.weights.tolist() == [[pytest.approx(3 / 4)]]
    assert gate.prob_sum.tolist() == pytest.approx([2 / 5, 3 / 5])
    assert gate.z_sum.item() == pytest.approx(math.log(4) ** 2)


def test_unit_weights_are_one_or_the_share_of_the_choices():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    gate = ops.topk_gate(logits, 2, score="unit", scale=3.0)
    assert gate.ids.tolist() == [[2, 1]]
    assert gate.weights.tolist() == [[3.0, 3.0]]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    renormalized = ops.topk_gate(logits, 2, score="unit", renormalize=True, scale=3.0)
    assert renormalized.weights.tolist() == [[1.5, 1.5]]


def test_the_softmax_after_top_k_is_over_the_chosen_logits():
    # exp(logits) = 2, 5 of the chosen; the probabilities stay those over all.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    gate = ops.topk_gate(logits, 2, score_after_top_k=True)
    assert gate.weights.tolist() == [[pytest.approx(5 / 7), pytest.approx(2 / 7)]]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_the_softmax_after_top_k_holds_where_the_one_over_all_underflows():
    # The bias makes experts 1 and 2 the choice, whose probabilities are 0 in float32.
    logits = torch.tensor([[200.0, 0.0, math.log(3)]])
    bias = torch.tensor([-1000.0, 0.0, 0.0])
    after = ops.topk_gate(logits, 2, score_after_top_k=True, bias=bias)
    assert after.ids.tolist() == [[2, 1]]
    assert after.weights.tolist() == [[pytest.approx(3 / 4), pytest.approx(1 / 4)]]
    # Before top-k nothing is left to renormalise: weights and their gradient are 0.
    logits.requires_grad_()
    before = ops.topk_gate(logits, 2, renormalize=True, bias=bias)
    assert before.weights.tolist() == [[0.0, 0.0]]
    before.weights.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, settings):
    assert_equals_the_reference(sample.logits(dtype), sample.top_k, settings)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_option_equals_the_reference(dtype, settings, options):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 20, generator=generator, dtype=torch.float64)
    settings = settings | tensors_for(options, 20, dtype)
    for top_k in (1, 6, 10):
        assert_equals_the_reference(logits.to(dtype), top_k, settings)


def test_sigmoids_that_are_all_zero_have_no_shares():
    logits = leaf(torch.full((2, 4), -500.0))
    gate = ops.topk_gate(logits, 2, score="sigmoid", renormalize=True)
    assert gate.weights.tolist() == [[0.0, 0.0]] * 2
    assert gate.prob_sum.tolist() == [0.0] * 4
    (gate.weights.sum() + gate.prob_sum.sum()).backward()
    assert logits.grad.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("score_after_top_k", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "row",
    [
        [1.0, math.nan, 2.0],
        [1.0, math.inf, 2.0],
        [1.0, -math.inf, 2.0],
        [-math.inf, -math.inf, -math.inf],
        [math.nan, math.inf, 0.0],
        [1e4, -1e4, 0.0],
    ],
)
def test_one_strange_token_gives_what_the_reference_gives(row, score, score_after_top_k):
    logits = torch.tensor([row])
    settings = {"score": score, "score_after_top_k": score_after_top_k}
    actual = ops.topk_gate(logits, 2, **settings)
    expected = reference.topk_gate(logits, 2, **settings)
    assert torch.equal(actual.ids, expected.ids)
    for name in ("weights", "prob_sum", "z_sum"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), equal_nan=True, msg=name
        )


def test_a_nan_that_is_not_chosen_leaves_the_softmax_after_top_k_alone():
    logits = torch.tensor([[1.0, math.nan, 2.0]])
    assert ops.topk_gate(logits, 2).weights.isnan().all()
    assert ops.topk_gate(logits, 2, score_after_top_k=True).weights.isfinite().all()
    sigmoid = ops.topk_gate(leaf(logits), 2, score="sigmoid").weights
    (d_logits,) = torch.autograd.grad(sigmoid.sum(), sigmoid.grad_fn.next_functions[0][0].variable)
    assert d_logits[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("with_resident", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=settings_name)
def test_gradients_pass_gradcheck(settings, with_resident):
    logits = leaf(SAMPLE.logits(torch.float64)[:4])
    if with_resident:
        mask = torch.tensor([True, False, True, True, False, False, True])
        settings = settings | {"resident": mask}

    def differentiable(logits):
        gate = ops.topk_gate(logits, 5, **settings)
        return gate.weights, gate.prob_sum, gate.z_sum

    torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("output", ["weights", "prob_sum", "z_sum"])
@pytest.mark.parametrize("score", SCORES)
def test_an_output_used_alone_gives_its_own_gradient(output, score):
    gradients = []
    for topk_gate in (ops.topk_gate, reference.topk_gate):
        logits = leaf(SAMPLE.logits(torch.float64))
        gate = topk_gate(logits, 3, score=score)
        getattr(gate, output).sum().backward()  # an expanded gradient
        gradients.append(logits.grad)
    assert_close(*gradients, torch.float64)


def test_ids_and_counts_are_not_differentiable():
    gate = ops.topk_gate(leaf(SAMPLE.logits(torch.float32)), 3)
    assert [tensor.requires_grad for tensor in gate] == [False, True, False, True, True]


def test_double_backward_is_refused():
    logits = leaf(SAMPLE.logits(torch.float32))
    z_sum = ops.topk_gate(logits, 3).z_sum
    (d_logits,) = torch.autograd.grad(z_sum, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="topk_gate_backward: double backward is not supported"):
        d_logits.sum().backward()


def test_settings_that_do_not_fit_are_named():
    logits = torch.zeros(2, 6)
    for settings, message in (
        ({"top_k": 0}, r"top_k must be in \[1, 6\], got 0"),
        ({"top_k": 7}, r"top_k must be in \[1, 6\], got 7"),
        ({"score": "tanh"}, "score must be 'softmax', 'sigmoid' or 'unit', got 'tanh'"),
        ({"group_score": "sum"}, "group_score must be 'max' or 'top2_sum', got 'sum'"),
        ({"num_groups": 4}, "num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 0}, "num_groups must divide the 6 experts, got 0"),
        ({"num_groups": 3, "top_k_groups": 4}, r"top_k_groups must be in \[1, 3\], got 4"),
        ({"num_groups": 3, "top_k_groups": 0}, r"top_k_groups must be in \[1, 3\], got 0"),
        (
            {"top_k": 3, "num_groups": 3},
            "top_k_groups must be at least 2 groups of 2 experts for top_k = 3, got 1",
        ),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(E,\) = \(6\), got \(5\)"),
        ({"bias": torch.zeros(6).double()}, "bias must be float32, got float64"),
        ({"resident": torch.zeros(6)}, "resident must be bool, got float32"),
        (
            {"resident": torch.zeros(2, 6, dtype=torch.bool)},
            r"resident must have shape \(E,\) = \(6\), got \(2, 6\)",
        ),
    ):
        with pytest.raises(RuntimeError, match=f"fomoe::topk_gate: {message}"):
            ops.topk_gate(logits, **({"top_k": 1} | settings))
    with pytest.raises(RuntimeError, match="logits must have at most 4096 experts"):
        ops.topk_gate(torch.zeros(1, 4097), 1)
    with pytest.raises(RuntimeError, match=r"logits must have shape \(T, E\) = \(any, any\)"):
        ops.topk_gate(torch.zeros(3), 1)
    with pytest.raises(RuntimeError, match="logits must be float64, float32, bfloat16 or float16"):
        ops.topk_gate(logits.int(), 1)


def test_the_backward_refuses_ids_that_the_forward_cannot_have_given():
    logits, ids = torch.zeros(2, 4), torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    resident = torch.tensor([True, True, False, True])
    backward = torch.ops.fomoe.topk_gate_backward
    settings = (0, False, False, 1.0)
    with pytest.raises(RuntimeError, match="ids must be resident experts, got 2 at slot 2"):
        backward(None, None, None, logits, resident, ids, *settings)
    ids[1, 0] = 4
    with pytest.raises(RuntimeError, match=r"ids must be in \[-1, 4\), got 4 at slot 2"):
        backward(None, None, None, logits, None, ids, *settings)
