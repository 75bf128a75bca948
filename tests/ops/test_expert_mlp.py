# SPDX-License-Identifier: Apache-2.0
"""expert_mlp against a hand-worked expert and the reference."""

import dataclasses
import math

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, gradient_of, leaf, name_of

from fomoe import ops, reference


def inputs(sample, dtype, activation="swiglu"):
    return (
        leaf(sample.x(dtype)),
        leaf(sample.weights(dtype)),
        leaf(sample.w1(dtype, activation)),
        leaf(sample.w2(dtype)),
    )


def one_expert_routing():
    return ops.route(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)


def test_swiglu_is_silu_of_the_gate_rows_times_the_up_rows():
    # D = F = 1: gate = 2 * 1, up = 2 * 3, out = 5 * hidden, weight 10.
    x, weights = torch.tensor([[2.0]]), torch.tensor([[10.0]])
    w1, w2 = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[5.0]]])
    y = ops.expert_mlp(x, weights, w1, w2, one_expert_routing())
    assert y.item() == pytest.approx(10 * 5 * (2 / (1 + math.exp(-2)) * 6), rel=1e-6)


def test_silu_is_the_two_matrix_expert():
    x, weights = torch.tensor([[2.0]]), torch.tensor([[10.0]])
    w1, w2 = torch.tensor([[[3.0]]]), torch.tensor([[[5.0]]])
    y = ops.expert_mlp(x, weights, w1, w2, one_expert_routing(), activation="silu")
    assert y.item() == pytest.approx(10 * 5 * (6 / (1 + math.exp(-6))), rel=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, activation):
    routing, results = sample.routing(), []
    for expert_mlp in (ops.expert_mlp, reference.expert_mlp):
        arguments = inputs(sample, dtype, activation)
        y = expert_mlp(*arguments, routing, activation)
        y.backward(gradient_like(y))
        results.append((y, *map(gradient_of, arguments)))
    for actual, expected in zip(*results, strict=True):
        # Pre-activation, hidden and output are each rounded to a 16-bit type.
        assert_close(actual, expected, dtype, scale=4 if dtype.itemsize == 2 else 1)


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_bfloat16_is_rounded_where_the_reference_rounds(activation):
    # D = F = 1 leaves the matrix products no sum: only the roundings and silu can differ.
    sample = dataclasses.replace(SAMPLE, tokens=2000, dim=1, expert_dim=1)
    arguments = [tensor.detach() for tensor in inputs(sample, torch.bfloat16, activation)]
    y = ops.expert_mlp(*arguments, sample.routing(), activation)
    expected = reference.expert_mlp(*arguments, sample.routing(), activation)
    assert (y != expected).float().mean() < 0.005


def test_an_expert_without_tokens_gets_zero_gradients():
    sample = next(s for s in SAMPLES if s.name == "one expert gets everything")
    x, weights, w1, w2 = inputs(sample, torch.float32)
    ops.expert_mlp(x, weights, w1, w2, sample.routing()).sum().backward()
    for weight in (w1, w2):
        idle = [e for e in range(sample.experts) if e != sample.favourite]
        assert not weight.grad[idle].any()
        assert weight.grad[sample.favourite].any()


def test_tokens_do_not_see_each_other():
    # A NaN token spoils its own row, its experts' gradients, and nothing else.
    x, weights, w1, w2 = inputs(SAMPLE, torch.float32)
    routing = SAMPLE.routing()
    with torch.no_grad():
        clean = ops.expert_mlp(x, weights, w1, w2, routing)
        x[3] = math.nan
        spoilt = ops.expert_mlp(x, weights, w1, w2, routing)
    others = [t for t in range(SAMPLE.tokens) if t != 3]
    assert (routing.slot_to_row[3] >= 0).any()
    assert spoilt[3].isnan().all()
    assert_close(spoilt[others], clean[others], torch.float32)


def test_a_segment_longer_than_one_product_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1200, 1, dtype=torch.int32)
    routing = ops.route(ids, torch.zeros(1, dtype=torch.int32), 1)
    shapes = [(1200, 4), (1200, 1), (1, 6, 4), (1, 4, 3)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    results = []
    for expert_mlp in (ops.expert_mlp, reference.expert_mlp):
        arguments = [leaf(value) for value in values]
        y = expert_mlp(*arguments, routing)
        y.backward(gradient_like(y))
        results.append((y, *map(gradient_of, arguments)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_gradients_pass_gradcheck(activation):
    routing = SAMPLE.routing()
    x, weights, w1, w2 = inputs(SAMPLE, torch.float64, activation)
    small = (leaf(x[:, :4]), weights, leaf(w1[:, :, :4]), leaf(w2[:, :4]))
    torch.autograd.gradcheck(lambda *a: ops.expert_mlp(*a, routing, activation), small)


def test_an_expanded_gradient_is_accepted():
    arguments = inputs(SAMPLE, torch.float32)
    ops.expert_mlp(*arguments, SAMPLE.routing()).sum().backward()
    expected = inputs(SAMPLE, torch.float32)
    y = ops.expert_mlp(*expected, SAMPLE.routing())
    y.backward(torch.ones_like(y))
    for actual, wanted in zip(arguments, expected, strict=True):
        assert torch.equal(actual.grad, wanted.grad)


def test_the_graph_can_be_run_backward_twice():
    x, *others = inputs(SAMPLE, torch.float32)
    y = ops.expert_mlp(x, *others, SAMPLE.routing())
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


def test_double_backward_is_refused():
    x, *others = inputs(SAMPLE, torch.float32)
    y = ops.expert_mlp(x, *others, SAMPLE.routing())
    (d_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp_backward: double backward is not supported"):
        d_x.sum().backward()


def test_only_x_and_the_pre_activation_are_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        arguments = inputs(SAMPLE, torch.float32)
        ops.expert_mlp(*arguments, SAMPLE.routing())
    rows = SAMPLE.tokens * SAMPLE.top_k
    own = {argument.data_ptr() for argument in arguments}
    extra = [t.shape for t in kept if t.is_floating_point() and t.data_ptr() not in own]
    assert extra == [(rows, 2 * SAMPLE.expert_dim)]


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("x", lambda t: t.bfloat16(), "w1 must be bfloat16, got float32"),
        ("w2", lambda t: t.bfloat16(), "w2 must be float32, got bfloat16"),
        ("weights", lambda t: t.double(), "weights must be float32, got float64"),
        ("x", lambda t: t[1:], r"x must have shape \(T, D\) = \(13, any\), got \(12, 17\)"),
        ("weights", lambda t: t[:, 1:], r"weights must have shape \(T, K\) = \(13, 3\)"),
        ("w1", lambda t: t[:, 1:], r"w1 must have shape \(E_local, 2\*F, D\) = \(3, 22, 17\)"),
        ("w2", lambda t: t[1:], r"w2 must have shape \(E_local, D, F\) = \(3, 17, any\)"),
        ("w2", lambda t: t[:, :, :0], r"w1 must have shape .* got \(3, 22, 17\)"),
        ("w1", lambda t: t[0], r"w1 must have 3 axes, got shape \(22, 17\)"),
        ("activation", lambda _: "relu", "activation must be 'swiglu' or 'silu', got 'relu'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(argument, change, message):
    names = ("x", "weights", "w1", "w2")
    arguments = dict(zip(names, inputs(SAMPLE, torch.float32), strict=True))
    arguments |= {"routing": SAMPLE.routing(), "activation": "swiglu"}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=f"fomoe::expert_mlp: {message}"):
        ops.expert_mlp(**arguments)
