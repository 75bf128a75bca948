# SPDX-License-Identifier: Apache-2.0
"""route against hand-worked ids and the reference."""

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


@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_routing_equals_the_reference(sample):
    arguments = sample.ids(), sample.expert_map(), sample.num_local_experts
    for actual, expected in zip(ops.route(*arguments), reference.route(*arguments), strict=True):
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected)


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
