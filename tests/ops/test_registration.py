# SPDX-License-Identifier: Apache-2.0
"""Every op and every backward op against torch's own checks of schema, fake kernel and autograd.

Backward ops are called without gradients: that theirs is refused is tested op by op.
"""

import pytest
import torch
from op_calls import kernels
from samples import DTYPES, SAMPLES, gradient_like, leaf, name_of, sum_dtype
from torch.library import opcheck

from fomoe import ops
from fomoe.ops._names import ACTIVATIONS, GATE_SCORES, GROUP_SCORES

OPS = torch.ops.fomoe
CHECKED = [s for s in SAMPLES if s.name in ("some ghosts", "no tokens", "not contiguous")]


def topk_gate(sample, dtype):
    logits, sigmoid = leaf(sample.logits(dtype)), GATE_SCORES["sigmoid"]
    no_groups = (1, 1, GROUP_SCORES["max"])
    yield OPS.topk_gate, (logits, None, None, sample.top_k, sigmoid, False, *no_groups, True, 2.0)
    bias = sample.random(sample.experts, seed=7, dtype=sum_dtype(dtype))
    resident = sample.expert_map() >= 0
    groups = (7, 4, GROUP_SCORES["top2_sum"])
    softmax = GATE_SCORES["softmax"]
    yield OPS.topk_gate, (logits, bias, resident, sample.top_k, softmax, True, *groups, False, 1.0)
    gate = ops.topk_gate(logits.detach(), sample.top_k, resident=resident)
    gradients = (gradient_like(gate.weights), None, gradient_like(gate.z_sum))
    inputs = (logits.detach(), resident, gate.ids)
    yield OPS.topk_gate_backward, (*gradients, *inputs, sigmoid, False, True, 2.0)
    yield OPS.topk_gate_backward, (*gradients, logits.detach(), None, gate.ids, 0, True, False, 1.0)


def route(sample, dtype):
    yield OPS.route, (sample.ids(), sample.expert_map(), sample.num_local_experts, None)
    yield OPS.route, (sample.ids(), sample.expert_map(), sample.num_local_experts, 2)


def destinations(sample, dtype):
    yield OPS.destinations, (sample.ids(), sample.expert_map(), sample.num_local_experts)


def permute(sample, dtype):
    yield OPS.permute, (leaf(sample.x(dtype)), *sample.routing())


def combine(sample, dtype):
    rows, weights = leaf(sample.rows(dtype, sample.dim)), leaf(sample.weights(dtype))
    yield OPS.combine, (rows, weights, *sample.routing())
    yield OPS.combine, (rows, None, *sample.routing())
    grad_y = gradient_like(sample.x(dtype))
    yield OPS.combine_backward, (grad_y, rows.detach(), weights.detach(), *sample.routing())


def grouped_gemm(sample, dtype):
    rows, weight = leaf(sample.rows(dtype, sample.dim)), leaf(sample.w1(dtype))
    offsets = sample.routing().offsets
    yield OPS.grouped_gemm, (rows, weight, offsets, False)
    yield OPS.grouped_gemm, (leaf(sample.rows(dtype, weight.shape[1])), weight, offsets, True)
    yield OPS.grouped_gemm_wgrad, (rows.detach(), gradient_like(rows), offsets)


def expert_mlp(sample, dtype):
    tensors = (sample.x(dtype), sample.weights(dtype), sample.w1(dtype), sample.w2(dtype))
    routing, swiglu = sample.routing(), ACTIVATIONS["swiglu"]
    grad_y = gradient_like(tensors[0])
    for biases in ((None, None), (sample.b1(dtype), sample.b2(dtype))):
        leaves = [None if bias is None else leaf(bias) for bias in biases]
        yield OPS.expert_mlp, (*map(leaf, tensors), *leaves, *routing, swiglu, True)
        _, pre_activation = OPS.expert_mlp(*tensors, *biases, *routing, swiglu, True)
        common = (grad_y, *tensors, *biases, pre_activation, *routing, swiglu)
        yield OPS.expert_mlp_backward, (*common, True, True)
        yield OPS.expert_mlp_backward, (*common, False, False)
    yield OPS.expert_mlp, (*tensors, None, None, *routing, swiglu, False)


CALLS = [topk_gate, route, destinations, permute, combine, grouped_gemm, expert_mlp]


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("sample", CHECKED, ids=name_of)
def test_the_registration_passes_opcheck(sample, dtype, calls):
    for op, arguments in calls(sample, dtype):
        opcheck(op.default, arguments)


def test_every_op_is_checked():
    checked = {op for calls in CALLS for op, _ in calls(SAMPLES[0], torch.float32)}
    assert {op.__name__ for op in checked} == kernels()


def test_a_layer_compiles_whole_and_once_for_all_token_counts():
    def layer(logits, x, w1, w2, expert_map):
        gate = ops.topk_gate(logits, 2)
        routing = ops.route(gate.ids, expert_map, 3)
        return ops.expert_mlp(x, gate.weights, w1, w2, routing).sum() + gate.z_sum

    def run(function, tokens):
        generator = torch.Generator().manual_seed(tokens)
        shapes = [(tokens, 4), (tokens, 5), (3, 6, 5), (3, 5, 3)]
        inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        loss = function(*inputs, torch.tensor([2, -1, 0, 1], dtype=torch.int32))
        loss.backward()
        return [loss.detach(), *(tensor.grad for tensor in inputs)]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 9, 11):
        with torch._dynamo.config.patch(error_on_recompile=tokens != 7):
            for actual, expected in zip(run(compiled, tokens), run(layer, tokens), strict=True):
                torch.testing.assert_close(actual, expected)


def test_outputs_have_the_accumulation_dtype_under_a_fake_mode():
    with torch._subclasses.FakeTensorMode():
        for dtype in DTYPES:
            gate = ops.topk_gate(torch.empty(3, 4, dtype=dtype), 2)
            assert gate.weights.dtype == gate.prob_sum.dtype == gate.z_sum.dtype
            assert gate.z_sum.dtype == sum_dtype(dtype)
            assert (gate.ids.dtype, gate.counts.dtype) == (torch.int32, torch.int64)
