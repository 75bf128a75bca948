# SPDX-License-Identifier: Apache-2.0
"""expert_mlp against a hand-worked expert and the reference."""

import dataclasses
import math

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, gradient_of, leaf, name_of

from fomoe import ops, reference

ACTIVATIONS = ["swiglu", "silu", "swiglu_clamped"]


def inputs(sample, dtype, activation="swiglu"):
    return (
        leaf(sample.x(dtype)),
        leaf(sample.weights(dtype)),
        leaf(sample.w1(dtype, activation)),
        leaf(sample.w2(dtype)),
    )


def biases(sample, dtype, activation):
    return {"b1": leaf(sample.b1(dtype, activation)), "b2": leaf(sample.b2(dtype))}


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


@pytest.mark.parametrize("has_bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, activation, has_bias):
    routing, results = sample.routing(), []
    for expert_mlp in (ops.expert_mlp, reference.expert_mlp):
        arguments = inputs(sample, dtype, activation)
        bias = biases(sample, dtype, activation) if has_bias else {}
        y = expert_mlp(*arguments, routing, activation, **bias)
        y.backward(gradient_like(y))
        results.append((y, *map(gradient_of, (*arguments, *bias.values()))))
    for actual, expected in zip(*results, strict=True):
        # Pre-activation, hidden and output are each rounded to a 16-bit type.
        assert_close(actual, expected, dtype, scale=4 if dtype.itemsize == 2 else 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_gradcheck(activation):
    routing = SAMPLE.routing()
    x, weights, w1, w2 = inputs(SAMPLE, torch.float64, activation)
    b1, b2 = biases(SAMPLE, torch.float64, activation).values()
    small = (leaf(x[:, :4]), weights, leaf(w1[:, :, :4]), leaf(w2[:, :4]), b1, leaf(b2[:, :4]))

    def experts(x, weights, w1, w2, b1, b2):
        return ops.expert_mlp(x, weights, w1, w2, routing, activation, b1=b1, b2=b2)

    torch.autograd.gradcheck(experts, small)


def test_swiglu_clamped_is_the_activation_of_gpt_oss():
    # D = F = 1, x = 1: gate 9 is clamped to 7, up -8 to -7; then gate 1 and up 2 pass.
    x, weights, w2 = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1, 1)
    for gate, up, g, u in ((9.0, -8.0, 7.0, -7.0), (1.0, 2.0, 1.0, 2.0), (-9.0, 8.0, -9.0, 7.0)):
        w1 = torch.tensor([[[gate], [up]]])
        y = ops.expert_mlp(x, weights, w1, w2, one_expert_routing(), "swiglu_clamped")
        assert y.item() == pytest.approx(g / (1 + math.exp(-1.702 * g)) * (u + 1), rel=1e-5)


def test_biases_reach_a_token_once_per_expert_that_runs():
    # Zero weights leave the biases: silu(b1) passes w2 = 0, so that y = sum of weight * b2.
    ids = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    routing = ops.route(ids, torch.tensor([0, 1, -1], dtype=torch.int32), 2)
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    zeros = torch.zeros(2, 1, 1)
    b2 = torch.tensor([[3.0], [5.0]])
    y = ops.expert_mlp(torch.ones(2, 1), weights, zeros, zeros, routing, "silu", b2=b2)
    assert y.tolist() == [[1 * 3 + 10 * 5], [1000 * 5]]  # expert 2 is a ghost


@pytest.mark.parametrize("frozen", ["x", "experts"])
def test_what_needs_no_gradient_gets_none_and_changes_no_other(frozen):
    names = ("x", "weights", "w1", "w2")
    full = dict(zip(names, inputs(SAMPLE, torch.float32), strict=True))
    full |= biases(SAMPLE, torch.float32, "swiglu")
    part = {name: leaf(tensor.detach()) for name, tensor in full.items()}
    for name in part:
        if (name == "x") == (frozen == "x") and name != "weights":
            part[name].requires_grad_(False)
    for arguments in (full, part):
        ops.expert_mlp(**arguments, routing=SAMPLE.routing()).sum().backward()
    assert part["weights"].grad is not None
    for name, tensor in part.items():
        assert (tensor.grad is None) != tensor.requires_grad
        assert tensor.grad is None or torch.equal(tensor.grad, full[name].grad)


def test_inference_keeps_no_pre_activation_and_gives_the_same_bits():
    arguments = inputs(SAMPLE, torch.float32)
    y = ops.expert_mlp(*arguments, SAMPLE.routing())
    with torch.no_grad():
        assert torch.equal(ops.expert_mlp(*arguments, SAMPLE.routing()), y)
    code, routing = 0, SAMPLE.routing()
    for keep, rows in ((True, SAMPLE.tokens * SAMPLE.top_k), (False, 0)):
        kept = torch.ops.fomoe.expert_mlp(*arguments, None, None, *routing, code, keep)[1]
        assert not kept.requires_grad
        assert kept.shape == (rows, 2 * SAMPLE.expert_dim)


def test_an_expanded_gradient_is_accepted():
    arguments = inputs(SAMPLE, torch.float32)
    ops.expert_mlp(*arguments, SAMPLE.routing()).sum().backward()
    expected = inputs(SAMPLE, torch.float32)
    y = ops.expert_mlp(*expected, SAMPLE.routing())
    y.backward(torch.ones_like(y))
    for actual, wanted in zip(arguments, expected, strict=True):
        assert torch.equal(actual.grad, wanted.grad)


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
        ("activation", lambda _: "relu", "activation must be .* 'swiglu_clamped', got 'relu'"),
        ("b1", lambda t: t[:, 1:], r"b1 must have shape \(E_local, 2\*F\) = \(3, 22\)"),
        ("b2", lambda t: t[1:], r"b2 must have shape \(E_local, D\) = \(3, 17\)"),
        ("b2", lambda t: t.double(), "b2 must be float32, got float64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(argument, change, message):
    names = ("x", "weights", "w1", "w2")
    arguments = dict(zip(names, inputs(SAMPLE, torch.float32), strict=True))
    arguments |= biases(SAMPLE, torch.float32, "swiglu")
    arguments |= {"routing": SAMPLE.routing(), "activation": "swiglu"}
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=f"fomoe::expert_mlp: {message}"):
        ops.expert_mlp(**arguments)
