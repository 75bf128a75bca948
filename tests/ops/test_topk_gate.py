# SPDX-License-Identifier: Apache-2.0
"""topk_gate against hand-worked logits and the reference."""

import math

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, leaf, name_of, sum_dtype

from fomoe import ops, reference

SETTINGS = [
    {"score": "softmax"},
    {"score": "softmax", "renormalize": True, "scale": 2.5},
    {"score": "sigmoid"},
    {"score": "sigmoid", "renormalize": True, "scale": 2.5},
]


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


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, settings):
    results = []
    for topk_gate in (ops.topk_gate, reference.topk_gate):
        logits = leaf(sample.logits(dtype))
        gate = topk_gate(logits, sample.top_k, **settings)
        outputs = (gate.weights, gate.prob_sum, gate.z_sum)
        torch.autograd.backward(outputs, [gradient_like(output) for output in outputs])
        results.append((gate, logits.grad))
    (actual, d_logits), (expected, d_logits_expected) = results
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.counts, expected.counts)
    for name in ("weights", "prob_sum", "z_sum"):
        assert_close(getattr(actual, name), getattr(expected, name), sum_dtype(dtype))
    assert_close(d_logits, d_logits_expected, dtype)


def test_ties_go_to_the_lowest_index_and_nan_ranks_last():
    logits = torch.tensor([[-0.0, 0.0, math.nan, -math.inf, math.nan, math.inf]])
    assert ops.topk_gate(logits, 6).ids.tolist() == [[5, 0, 1, 3, 2, 4]]
    assert ops.topk_gate(torch.zeros(1, 4096), 40).ids.tolist() == [list(range(40))]


@pytest.mark.parametrize("top_k", [3, 40], ids=["few", "many"])
def test_ids_with_ties_nan_and_infinity_equal_the_reference(top_k):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (200, 50), generator=generator).float()
    special = torch.randint(0, 12, logits.shape, generator=generator)
    for code, value in enumerate([math.nan, math.inf, -math.inf]):
        logits[special == code] = value
    for score in ("softmax", "sigmoid"):
        actual = ops.topk_gate(logits, top_k, score=score)
        expected = reference.topk_gate(logits, top_k, score=score)
        assert torch.equal(actual.ids, expected.ids)
        torch.testing.assert_close(actual.weights, expected.weights, equal_nan=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
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
def test_one_strange_token_gives_what_the_reference_gives(row, score):
    logits = torch.tensor([row])
    actual = ops.topk_gate(logits, 2, score=score)
    expected = reference.topk_gate(logits, 2, score=score)
    assert torch.equal(actual.ids, expected.ids)
    for name in ("weights", "prob_sum", "z_sum"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), equal_nan=True, msg=name
        )


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_gradients_pass_gradcheck(settings):
    logits = leaf(SAMPLE.logits(torch.float64)[:4])

    def differentiable(logits):
        gate = ops.topk_gate(logits, 3, **settings)
        return gate.weights, gate.prob_sum, gate.z_sum

    torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("output", ["weights", "prob_sum", "z_sum"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
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
    logits = torch.zeros(2, 3)
    for top_k in (0, 4):
        message = rf"topk_gate: top_k must be in \[1, 3\], got {top_k}"
        with pytest.raises(RuntimeError, match=message):
            ops.topk_gate(logits, top_k)
    with pytest.raises(
        RuntimeError, match=r"score must be .softmax., .sigmoid. or .unit., got .tanh."
    ):
        ops.topk_gate(logits, 1, score="tanh")
    with pytest.raises(RuntimeError, match="logits must have at most 4096 experts"):
        ops.topk_gate(torch.zeros(1, 4097), 1)
    with pytest.raises(RuntimeError, match=r"logits must have shape \(T, E\) = \(any, any\)"):
        ops.topk_gate(torch.zeros(3), 1)
    with pytest.raises(RuntimeError, match="logits must be float64, float32, bfloat16 or float16"):
        ops.topk_gate(logits.int(), 1)
