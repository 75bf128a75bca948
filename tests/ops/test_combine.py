# SPDX-License-Identifier: Apache-2.0
"""combine against hand-worked tokens and the reference."""

import math

import pytest
import torch
from samples import DTYPES, SAMPLE, SAMPLES, assert_close, gradient_like, leaf, name_of

from fomoe import ops, reference

# Slots 0..3 choose experts 1, 0 | 2, 1; expert 2 is a ghost. Rows hold slots 1, 0, 3; the last is
# past the end and must never be read.
IDS = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32)
ROUTING = ops.route(IDS, torch.tensor([0, 1, -1], dtype=torch.int32), 2)
ROWS = torch.tensor([[1.0], [2.0], [3.0], [math.nan]])
WEIGHTS = torch.tensor([[10.0, 100.0], [math.nan, 2.0]])


def test_a_token_is_the_weighted_sum_of_its_resident_rows():
    assert ops.combine(ROWS, WEIGHTS, ROUTING).tolist() == [[10 * 2 + 100 * 1], [2 * 3]]
    assert ops.combine(ROWS, None, ROUTING).tolist() == [[3], [3]]


def test_gradients_of_ghosts_and_of_the_tail_are_zero():
    rows, weights = leaf(ROWS), leaf(WEIGHTS)
    ops.combine(rows, weights, ROUTING).backward(torch.tensor([[5.0], [7.0]]))
    assert rows.grad.tolist() == [[500], [50], [14], [0]]
    assert weights.grad.tolist() == [[10, 5], [0, 21]]


def test_a_bf16_sum_is_rounded_once():
    # In bf16 256 + 1 + 1 stays 256 when rounded at each step; in float32 it is 258.
    ids = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    routing = ops.route(ids, torch.arange(3, dtype=torch.int32), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert ops.combine(rows, None, routing).item() == 258


@pytest.mark.parametrize("is_weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_results_and_gradients_equal_the_reference(sample, dtype, is_weighted):
    routing, results = sample.routing(), []
    for combine in (ops.combine, reference.combine):
        rows = leaf(sample.rows(dtype, sample.dim))
        weights = leaf(sample.weights(dtype)) if is_weighted else None
        y = combine(rows, weights, routing)
        y.backward(gradient_like(y))
        results.append((y, rows.grad, weights.grad if is_weighted else None))
    (y, d_rows, d_weights), (y_expected, d_rows_expected, d_weights_expected) = results
    assert torch.equal(y, y_expected)
    assert torch.equal(d_rows, d_rows_expected)
    if is_weighted:
        assert_close(d_weights, d_weights_expected, d_weights.dtype)


def test_an_expanded_gradient_is_accepted():
    rows, weights = leaf(SAMPLE.rows(torch.float32, 5)), leaf(SAMPLE.weights(torch.float32))
    ops.combine(rows, weights, SAMPLE.routing()).sum().backward()
    is_resident = SAMPLE.routing().slot_to_row >= 0
    assert rows.grad.sum().item() == pytest.approx(5 * weights[is_resident].sum().item(), rel=1e-5)


def test_gradients_pass_gradcheck():
    routing = SAMPLE.routing()
    rows, weights = leaf(SAMPLE.rows(torch.float64, 3)), leaf(SAMPLE.weights(torch.float64))
    torch.autograd.gradcheck(lambda r, w: ops.combine(r, w, routing), (rows, weights))
    torch.autograd.gradcheck(lambda r: ops.combine(r, None, routing), rows)
    torch.autograd.gradgradcheck(lambda r: ops.combine(r, None, routing), rows)


def test_differentiating_the_weighted_backward_is_refused():
    rows, weights = leaf(ROWS), leaf(WEIGHTS)
    y = ops.combine(rows, weights, ROUTING)
    (d_rows,) = torch.autograd.grad(y.sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="combine_backward: double backward is not supported"):
        d_rows.sum().backward()


def test_weights_must_be_in_the_accumulation_dtype():
    with pytest.raises(RuntimeError, match="combine: weights must be float32, got bfloat16"):
        ops.combine(ROWS.bfloat16(), WEIGHTS.bfloat16(), ROUTING)
    with pytest.raises(RuntimeError, match="combine: weights must be float64, got float32"):
        ops.combine(ROWS.double(), WEIGHTS, ROUTING)


def test_a_routing_whose_maps_are_not_inverse_is_refused():
    swapped = ROUTING._replace(row_to_slot=torch.tensor([0, 1, 3, -1], dtype=torch.int32))
    shared = ROUTING._replace(slot_to_row=torch.tensor([[1, 0], [1, 2]], dtype=torch.int32))
    for routing in (swapped, shared):
        with pytest.raises(RuntimeError, match="row_to_slot must be inverse to each other"):
            ops.combine(ROWS, WEIGHTS, routing)


def test_shapes_that_do_not_fit_the_routing_are_named():
    message = r"combine: rows must have shape \(T\*K, D\) = \(4, any\), got \(3, 1\)"
    with pytest.raises(RuntimeError, match=message):
        ops.combine(ROWS[:3], WEIGHTS, ROUTING)
    with pytest.raises(RuntimeError, match=r"weights must have shape \(T, K\) = \(2, 2\)"):
        ops.combine(ROWS, WEIGHTS[:1], ROUTING)
