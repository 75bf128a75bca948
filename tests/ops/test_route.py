# SPDX-License-Identifier: Apache-2.0
"""route against hand-worked ids and the reference."""

import math

import pytest
import torch
from samples import SAMPLES, name_of

from fomoe import ops, reference


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_slots_are_ordered_by_local_expert_then_by_slot():
    # Expert 1 is a ghost; expert 2 is local 0 and expert 0 is local 1. Slot 5 has no expert.
    routing = ops.route(int32([[0, 2], [1, 0], [2, -1]]), int32([1, -1, 0]), 2)
    assert routing.offsets.tolist() == [0, 2, 4]
    assert routing.row_to_slot.tolist() == [1, 4, 0, 3, -1, -1]
    assert routing.slot_to_row.tolist() == [[2, 0], [-1, 3], [1, -1]]


def test_an_expert_keeps_the_slots_of_its_earliest_tokens():
    # Expert 0 is chosen by slots 0, 3, 5, expert 1 by slots 1, 2, 4.
    ids, expert_map = int32([[0, 1], [1, 0], [1, 0]]), int32([0, 1])
    routing = ops.route(ids, expert_map, 2, capacity=2)
    assert routing.offsets.tolist() == [0, 2, 4]
    assert routing.row_to_slot.tolist() == [0, 3, 1, 2, -1, -1]
    assert routing.slot_to_row.tolist() == [[0, 2], [3, 1], [-1, -1]]


def test_a_capacity_of_zero_drops_every_slot():
    routing = ops.route(int32([[0, 1]]), int32([0, 1]), 2, capacity=0)
    assert routing.offsets.tolist() == [0, 0, 0]
    assert routing.row_to_slot.tolist() == [-1, -1]
    assert routing.slot_to_row.tolist() == [[-1, -1]]


@pytest.mark.parametrize("capacity", [None, 0, 1, 4, 2**40], ids=lambda c: f"capacity {c}")
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_routing_equals_the_reference(sample, capacity):
    arguments = sample.ids(), sample.expert_map(), sample.num_local_experts
    routings = [route(*arguments, capacity=capacity) for route in (ops.route, reference.route)]
    for actual, expected in zip(*routings, strict=True):
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected)


def test_a_capacity_that_follows_the_tokens_compiles_once():
    def route(ids, expert_map):
        capacity = math.ceil(0.5 * ids.shape[0] * ids.shape[1] / 4)
        return ops.route(ids, expert_map, 4, capacity=capacity)

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager", dynamic=True)
    expert_map = torch.arange(4, dtype=torch.int32)
    for tokens in (7, 9, 40):
        ids = torch.randint(4, (tokens, 2), generator=torch.Generator().manual_seed(tokens))
        ids = ids.to(torch.int32)
        with torch._dynamo.config.patch(error_on_recompile=tokens != 7):
            actual, expected = compiled(ids, expert_map), route(ids, expert_map)
        assert (expected.slot_to_row == -1).any()
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


def test_an_id_outside_the_experts_is_named_with_its_place():
    message = r"fomoe::route: ids must be in \[-1, 3\), got 3 at slot 3 \(token 1\)"
    with pytest.raises(RuntimeError, match=message):
        ops.route(int32([[0, 1], [2, 3]]), int32([0, 1, 2]), 3)
    with pytest.raises(RuntimeError, match="got -2 at slot 0"):
        ops.route(int32([[-2, 1]]), int32([0, 1, 2]), 3)


def test_a_map_entry_outside_the_local_experts_is_named():
    message = r"expert_map must be in \[-1, 2\), got 2 for expert 1"
    with pytest.raises(RuntimeError, match=message):
        ops.route(int32([[0, 1]]), int32([0, 2]), 2)


def test_more_slots_than_int32_counts_are_refused():
    ids = int32([[0]]).expand(2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"T\*K must fit in int32, got ids of shape"):
        ops.route(ids, int32([0]), 1)


def test_wrong_types_and_shapes_are_named():
    with pytest.raises(RuntimeError, match="ids must be int32, got int64"):
        ops.route(torch.zeros(2, 2, dtype=torch.int64), int32([0]), 1)
    with pytest.raises(RuntimeError, match=r"ids must have shape \(T, K\)"):
        ops.route(int32([0, 0]), int32([0]), 1)
    with pytest.raises(RuntimeError, match="num_local_experts must be at least 0, got -1"):
        ops.route(int32([[0]]), int32([-1]), -1)
    with pytest.raises(RuntimeError, match="fomoe::route: capacity must be at least 0, got -1"):
        ops.route(int32([[0]]), int32([0]), 1, capacity=-1)
