# SPDX-License-Identifier: Apache-2.0
"""The routing's specification against hand-worked tables and a loop over slots."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.reference import route


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_rows_are_ordered_by_expert_and_then_by_slot():
    # Slots 0..5 choose experts 1, 0 | 1, 2 | 0, 1.
    routing = route(int32([[1, 0], [1, 2], [0, 1]]), int32([0, 1, 2]), 3)

    assert routing.offsets.tolist() == [0, 2, 5, 6]
    assert routing.row_to_slot.tolist() == [1, 4, 0, 2, 5, 3]
    assert routing.slot_to_row.tolist() == [[2, 0], [3, 5], [1, 4]]


def test_ghosts_and_missing_ids_get_no_row():
    # Expert 1 is a ghost; experts 0 and 2 are local 1 and 0. Slot 3 has no expert.
    routing = route(int32([[1, 0], [2, -1]]), int32([1, -1, 0]), 2)

    assert routing.offsets.tolist() == [0, 1, 2]
    assert routing.row_to_slot.tolist() == [2, 1, -1, -1]
    assert routing.slot_to_row.tolist() == [[-1, 1], [0, -1]]


def test_an_expert_nobody_chose_has_an_empty_segment():
    assert route(int32([[2], [0]]), int32([0, 1, 2]), 3).offsets.tolist() == [0, 1, 1, 2]


def test_all_tokens_on_one_expert_keep_their_order():
    routing = route(int32([[1]] * 4), int32([0, 1]), 2)
    assert routing.offsets.tolist() == [0, 0, 4]
    assert routing.row_to_slot.tolist() == [0, 1, 2, 3]


def test_an_expert_keeps_its_first_slots_up_to_the_capacity():
    # Expert 0 is chosen by slots 0, 3, 5, expert 1 by slots 1, 2, 4.
    ids, expert_map = int32([[0, 1], [1, 0], [1, 0]]), int32([0, 1])
    routing = route(ids, expert_map, 2, capacity=2)
    assert routing.offsets.tolist() == [0, 2, 4]
    assert routing.row_to_slot.tolist() == [0, 3, 1, 2, -1, -1]
    assert routing.slot_to_row.tolist() == [[0, 2], [3, 1], [-1, -1]]
    nothing = route(ids, expert_map, 2, capacity=0)
    assert nothing.offsets.tolist() == [0, 0, 0]
    assert nothing.slot_to_row.eq(-1).all()
    enough = route(ids, expert_map, 2, capacity=3)
    assert all(torch.equal(a, b) for a, b in zip(enough, route(ids, expert_map, 2), strict=True))


def test_a_negative_capacity_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        route(int32([[0]]), int32([0]), 1, capacity=-1)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_resident_experts_every_slot_is_a_ghost(num_tokens):
    routing = route(torch.zeros(num_tokens, 2, dtype=torch.int32), int32([-1, -1]), 0)
    assert routing.offsets.tolist() == [0]
    assert routing.row_to_slot.tolist() == [-1] * (2 * num_tokens)
    assert routing.slot_to_row.tolist() == [[-1, -1]] * num_tokens


def test_everything_is_int32():
    assert {part.dtype for part in route(int32([[0]]), int32([0]), 1)} == {torch.int32}


@pytest.mark.parametrize("expert", [-2, 3])
def test_an_id_out_of_range_is_refused_and_named(expert):
    with pytest.raises(ValueError, match=rf"ids must be in \[-1, 3\), got {expert}"):
        route(int32([[0, expert]]), int32([0, 1, 2]), 3)


def test_a_map_to_a_row_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expert_map must be in \[-1, 2\), got 2"):
        route(int32([[0]]), int32([0, 2]), 2)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_tables_equal_a_loop_over_experts_and_slots(data):
    num_experts = data.draw(st.integers(1, 6))
    resident = data.draw(st.lists(st.integers(0, num_experts - 1), unique=True).map(sorted))
    top_k = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    ids = data.draw(st.lists(row, max_size=6))
    expert_map = [resident.index(e) if e in resident else -1 for e in range(num_experts)]

    routing = route(int32(ids).reshape(-1, top_k), int32(expert_map), len(resident))

    slots = [expert for row in ids for expert in row]
    rows = [slot for e in resident for slot, chosen in enumerate(slots) if chosen == e]
    assert routing.row_to_slot.tolist() == rows + [-1] * (len(slots) - len(rows))
    assert routing.slot_to_row.flatten().tolist() == [
        rows.index(slot) if slot in rows else -1 for slot in range(len(slots))
    ]
    sizes = [slots.count(e) for e in resident]
    assert routing.offsets.tolist() == [sum(sizes[:e]) for e in range(len(sizes) + 1)]
