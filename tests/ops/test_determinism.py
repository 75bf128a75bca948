# SPDX-License-Identifier: Apache-2.0
"""Same bits from run to run, and, without matrix products, for any number of threads."""

import pytest
import torch
from samples import Sample, gradient_like, leaf, name_of, sum_dtype

from fomoe import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Large enough for every op to split its work.
SAMPLE = Sample(
    name="large", tokens=1000, experts=16, top_k=4, dim=96, expert_dim=40, residents=tuple(range(9))
)


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def outputs_and_gradients(function, *inputs):
    inputs = [leaf(tensor) for tensor in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    smooth = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(smooth, [gradient_like(output) for output in smooth])
    return [*outputs, *(tensor.grad for tensor in inputs)]


def restricted_gate(logits):
    return ops.topk_gate(
        logits,
        4,
        score="sigmoid",
        bias=SAMPLE.random(16, seed=7, dtype=sum_dtype(logits.dtype)),
        resident=SAMPLE.expert_map() >= 0,
        num_groups=4,
        top_k_groups=2,
        group_score="top2_sum",
        renormalize=True,
    )


def gate_permute_combine(dtype):
    routing = SAMPLE.routing()
    return [
        *outputs_and_gradients(
            lambda logits: ops.topk_gate(logits, 4, score="sigmoid"), SAMPLE.logits(dtype)
        ),
        *outputs_and_gradients(restricted_gate, SAMPLE.logits(dtype)),
        *outputs_and_gradients(lambda x: ops.permute(x, routing), SAMPLE.x(dtype)),
        *outputs_and_gradients(
            lambda rows, weights: ops.combine(rows, weights, routing),
            SAMPLE.rows(dtype, 96),
            SAMPLE.weights(dtype),
        ),
        *ops.route(SAMPLE.ids(), SAMPLE.expert_map(), SAMPLE.num_local_experts),
        *ops.route(SAMPLE.ids(), SAMPLE.expert_map(), SAMPLE.num_local_experts, capacity=100),
    ]


def matrix_products(dtype):
    routing = SAMPLE.routing()
    w1, w2 = SAMPLE.w1(dtype), SAMPLE.w2(dtype)
    return [
        *outputs_and_gradients(
            lambda x, weights, w1, w2: ops.expert_mlp(x, weights, w1, w2, routing),
            SAMPLE.x(dtype),
            SAMPLE.weights(dtype),
            w1,
            w2,
        ),
        *outputs_and_gradients(
            lambda rows, w1: ops.grouped_gemm(rows, w1, routing.offsets), SAMPLE.rows(dtype, 96), w1
        ),
    ]


def assert_same_bits(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_runs_give_the_same_bits(dtype):
    assert_same_bits(gate_permute_combine(dtype), gate_permute_combine(dtype))
    assert_same_bits(matrix_products(dtype), matrix_products(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_number_of_threads_does_not_change_a_bit(dtype, with_threads):
    with_threads(1)
    expected = gate_permute_combine(dtype)
    for threads in (2, 3):
        with_threads(threads)
        assert_same_bits(gate_permute_combine(dtype), expected)
