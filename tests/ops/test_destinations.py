# SPDX-License-Identifier: Apache-2.0
"""destinations against hand-worked ids and the reference."""

import pytest
import torch
from samples import SAMPLES, name_of

from fomoe import ops, reference


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_every_group_of_a_token_stands_once_and_in_order():
    # Experts 0 and 3 are in group 1, expert 1 in group 0, expert 2 in none.
    ids = int32([[3, 1, 0], [2, 2, -1], [0, -1, 3]])
    groups = ops.destinations(ids, int32([1, 0, -1, 1]), 2)
    assert groups.tolist() == [[0, 1], [-1, -1], [1, -1]]


@pytest.mark.parametrize("num_groups", [1, 3, 70])
@pytest.mark.parametrize("sample", SAMPLES, ids=name_of)
def test_groups_equal_the_reference(sample, num_groups):
    groups = (torch.arange(sample.experts, dtype=torch.int32) * 11) % (num_groups + 1) - 1
    actual, expected = (
        module.destinations(sample.ids(), groups, num_groups) for module in (ops, reference)
    )
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


def test_what_is_out_of_range_is_named_with_its_place():
    message = r"fomoe::destinations: ids must be in \[-1, 3\), got 3 at slot 3 \(token 1\)"
    with pytest.raises(RuntimeError, match=message):
        ops.destinations(int32([[0, 1], [2, 3]]), int32([0, 1, 2]), 3)
    message = r"group_of_expert must be in \[-1, 2\), got 2 for expert 1"
    with pytest.raises(RuntimeError, match=message):
        ops.destinations(int32([[0, 1]]), int32([0, 2]), 2)
