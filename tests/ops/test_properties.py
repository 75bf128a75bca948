# SPDX-License-Identifier: Apache-2.0
"""What holds for any shape, any residents and any choice of experts."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, TOLERANCES, assert_close, gradient_like, gradient_of, leaf, sum_dtype

from fomoe import ops, reference

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=300)
ACTIVATIONS = ["swiglu", "silu", "swiglu_clamped"]


@st.composite
def choices(draw, lowest_id=-1, all_resident=False, top_k=None):
    """ids (T, K), expert_map (E,) and the residents in local order; T or their number may be 0.

    An expert may be chosen twice by a token.
    """
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, 4)) if top_k is None else top_k
    residents = draw(st.permutations(range(num_experts)))
    residents = residents if all_resident else residents[: draw(st.integers(0, num_experts))]
    row = st.lists(st.integers(lowest_id, num_experts - 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, max_size=9))
    ids = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), top_k)
    return ids, expert_map_of(residents, num_experts), residents


def expert_map_of(residents, num_experts):
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    expert_map[residents] = torch.arange(len(residents), dtype=torch.int32)
    return expert_map


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@EXAMPLES
@given(data=st.data(), top_k=st.sampled_from([1, 2, 4, 8]), dtype=st.sampled_from(DTYPES))
def test_permute_then_combine_with_the_weights_1_over_k_is_the_identity(data, top_k, dtype):
    ids, expert_map, residents = data.draw(choices(lowest_id=0, all_resident=True, top_k=top_k))
    routing = ops.route(ids, expert_map, len(residents))
    # Seven bits, so that sums of fractions of 1/8 are exact in every dtype.
    x = (normal(len(ids), data.draw(st.integers(0, 5))) * 20).round().clamp(-127, 127).to(dtype)
    weights = torch.full(ids.shape, 1 / top_k, dtype=sum_dtype(dtype))
    assert torch.equal(ops.combine(ops.permute(x, routing), weights, routing), x)


@EXAMPLES
@given(drawn=choices(lowest_id=0, all_resident=True, top_k=3))
def test_a_third_of_three_copies_is_the_token_up_to_rounding(drawn):
    ids, expert_map, residents = drawn
    routing, x = ops.route(ids, expert_map, len(residents)), normal(len(ids), 3)
    weights = torch.full(ids.shape, 1 / 3, dtype=torch.float64)
    assert_close(ops.combine(ops.permute(x, routing), weights, routing), x, torch.float64)


@EXAMPLES
@given(drawn=choices(), capacity=st.none() | st.integers(0, 5))
def test_slots_and_rows_are_inverse_to_each_other(drawn, capacity):
    ids, expert_map, residents = drawn
    routing = ops.route(ids, expert_map, len(residents), capacity=capacity)
    slots, rows = routing.slot_to_row.flatten().tolist(), routing.row_to_slot.tolist()
    executed = routing.offsets.tolist()[-1]
    assert [slots[slot] for slot in rows[:executed]] == list(range(executed))
    assert [rows[row] for row in slots if row >= 0] == [
        s for s, row in enumerate(slots) if row >= 0
    ]
    assert sum(row >= 0 for row in slots) == executed
    assert rows[executed:] == [-1] * (ids.numel() - executed)


@EXAMPLES
@given(drawn=choices(), capacity=st.none() | st.integers(0, 5))
def test_an_expert_executes_its_first_slots_in_order_up_to_the_capacity(drawn, capacity):
    ids, expert_map, residents = drawn
    first, second = (ops.route(ids, expert_map, len(residents), capacity=capacity) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    offsets, rows = first.offsets.tolist(), first.row_to_slot.tolist()
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] <= ids.numel()
    drops = 0
    for expert, (begin, end) in zip(residents, pairwise(offsets), strict=True):
        slots = (ids.flatten() == expert).nonzero().flatten().tolist()
        assert rows[begin:end] == slots[:capacity]
        drops += len(slots[capacity:]) if capacity is not None else 0
    ghosts = sum(expert not in residents for expert in ids.flatten().tolist())
    assert offsets[-1] + ghosts + drops == ids.numel()


@EXAMPLES
@given(
    data=st.data(),
    tokens=st.integers(0, 9),
    experts=st.integers(1, 12),
    score=st.sampled_from(["softmax", "sigmoid", "unit"]),
)
def test_the_counts_of_the_gate_are_those_of_its_ids_and_of_the_rows(data, tokens, experts, score):
    top_k = data.draw(st.integers(1, experts))
    residents = sorted(data.draw(st.sets(st.integers(0, experts - 1))))
    expert_map = expert_map_of(residents, experts)
    logits = normal(tokens, experts, seed=data.draw(st.integers(0, 99)))
    is_partitioned, capacity = data.draw(st.booleans()), data.draw(st.integers(0, 5))
    gate = ops.topk_gate(
        logits, top_k, score=score, resident=expert_map >= 0 if is_partitioned else None
    )
    chosen = gate.ids[gate.ids >= 0].long()
    assert torch.equal(gate.counts, torch.bincount(chosen, minlength=experts))
    # Choices come first and are different experts; a slot without one weighs nothing.
    choices_per_token = min(top_k, len(residents)) if is_partitioned else top_k
    assert ((gate.ids >= 0) == (torch.arange(top_k) < choices_per_token)).all()
    assert all(
        len(set(row)) == choices_per_token for row in gate.ids[:, :choices_per_token].tolist()
    )
    assert not gate.weights[gate.ids < 0].any()

    routing = ops.route(gate.ids, expert_map, len(residents), capacity=capacity)
    executed = gate.counts[residents].clamp(max=capacity)
    assert torch.equal(routing.offsets.diff().long(), executed)
    drops = gate.counts[residents].sum() - executed.sum()
    ghosts = (gate.ids < 0).sum() + gate.counts.sum() - gate.counts[residents].sum()
    assert executed.sum() + ghosts + drops == tokens * top_k
    assert (routing.slot_to_row < 0).sum() == ghosts + drops


@EXAMPLES
@given(
    drawn=choices(),
    capacity=st.none() | st.integers(0, 5),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    has_biases=st.booleans(),
)
def test_expert_mlp_equals_the_reference(drawn, capacity, sizes, dtype, activation, has_biases):
    ids, expert_map, residents = drawn
    dim, expert_dim = sizes
    routing = ops.route(ids, expert_map, len(residents), capacity=capacity)
    pre_dim = expert_dim * (1 if activation == "silu" else 2)
    shapes = [(len(ids), dim), ids.shape]
    shapes += [(len(residents), pre_dim, dim), (len(residents), dim, expert_dim)]
    shapes += [(len(residents), pre_dim), (len(residents), dim)] if has_biases else []
    values = [normal(*shape, seed=seed) / shape[-1] ** 0.5 for seed, shape in enumerate(shapes)]
    values = [value.to(dtype) for value in values]
    values[1] = values[1].to(sum_dtype(dtype))
    results = []
    for expert_mlp in (ops.expert_mlp, reference.expert_mlp):
        leaves = [leaf(value) for value in values]
        biases = dict(zip(("b1", "b2"), leaves[4:], strict=has_biases))
        y = expert_mlp(*leaves[:4], routing, activation, **biases)
        y.backward(gradient_like(y))
        results.append([y, *map(gradient_of, leaves)])
    for actual, expected in zip(*results, strict=True):
        # Terms are about 1, and may cancel. Between their sums lie up to three roundings.
        size = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 0.0)
        tolerance = size * TOLERANCES[dtype] * (12 if dtype.itemsize == 2 else 2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
