# SPDX-License-Identifier: Apache-2.0
"""destinations against hand-worked ids and the reference."""

import pytest
import torch
from samples import SAMPLES, name_of

from fomoe import ops, reference


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


# Experts 0 and 3 belong to group 2, 1 to group 0, 4 to group 1; nobody has expert 2.
GROUPS = [2, 0, -1, 2, 1]


@pytest.mark.parametrize("destinations", [ops.destinations, reference.destinations])
def test_a_token_goes_once_to_every_group_of_its_experts_in_ascending_order(destinations):
    ids = int32([[0, 3, 1], [2, -1, 2], [0, 4, 1]])
    expected = [[0, 2, -1], [-1, -1, -1], [0, 1, 2]]
    assert destinations(ids, int32(GROUPS), 3).tolist() == expected


@pytest.mark.parametrize("destinations", [ops.destinations, reference.destinations])
def test_a_row_is_no_wider_than_the_groups(destinations):
    assert destinations(int32([[0, 1, 1], [0, 2, 2]]), int32([1, 0, -1]), 2).tolist() == [
        [0, 1],
        [1, -1],
    ]
    assert destinations(int32([[0, 1]]), int32([-1, -1]), 0).shape == (1, 0)


@pytest.mark.parametrize("groups", [1, 2, 5, 20])
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_destinations_equal_the_reference(sample, groups):
    generator = torch.Generator().manual_seed(groups)
    owners = torch.randint(-1, groups, (sample.experts,), generator=generator, dtype=torch.int32)
    actual = ops.destinations(sample.ids(), owners, groups)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, reference.destinations(sample.ids(), owners, groups))


def test_route_orders_the_destinations_by_group():
    groups = ops.destinations(int32([[0, 3], [1, 0], [4, 1]]), int32(GROUPS), 3)
    routing = ops.route(groups, torch.arange(3, dtype=torch.int32), 3)
    assert routing.offsets.tolist() == [0, 2, 3, 5]
    assert (routing.row_to_slot[:5] // 2).tolist() == [1, 2, 2, 0, 1]  # tokens


def test_an_id_outside_the_experts_is_named_with_its_place():
    message = r"fomoe::destinations: ids must be in \[-1, 3\), got 3 at slot 3 \(token 1\)"
    with pytest.raises(RuntimeError, match=message):
        ops.destinations(int32([[0, 1], [2, 3]]), int32([0, 1, 2]), 3)
    with pytest.raises(ValueError, match=r"ids must be in \[-1, 3\), got -2"):
        reference.destinations(int32([[0, -2]]), int32([0, 1, 2]), 3)


def test_a_group_outside_the_groups_is_named():
    message = r"group_of_expert must be in \[-1, 2\), got 2 for expert 1"
    with pytest.raises(RuntimeError, match=message):
        ops.destinations(int32([[0, 1]]), int32([0, 2]), 2)
    with pytest.raises(ValueError, match=r"group_of_expert must be in \[-1, 2\), got 2"):
        reference.destinations(int32([[0, 1]]), int32([0, 2]), 2)


def test_wrong_types_and_shapes_are_named():
    with pytest.raises(RuntimeError, match="ids must be int32, got int64"):
        ops.destinations(torch.zeros(2, 2, dtype=torch.int64), int32([0]), 1)
    with pytest.raises(RuntimeError, match=r"ids must have shape \(T, K\)"):
        ops.destinations(int32([0, 0]), int32([0]), 1)
    with pytest.raises(RuntimeError, match="num_groups must be at least 0, got -1"):
        ops.destinations(int32([[0]]), int32([-1]), -1)
    with pytest.raises(ValueError, match="num_groups must be at least 0, got -1"):
        reference.destinations(int32([[0]]), int32([-1]), -1)


def test_more_slots_than_int32_counts_are_refused():
    with pytest.raises(RuntimeError, match=r"T\*K must fit in int32, got ids of shape"):
        ops.destinations(int32([[0]]).expand(2**16, 2**15), int32([0]), 1)
