# SPDX-License-Identifier: Apache-2.0
"""How many ranks a model's groups can be on."""

from dataclasses import replace

import pytest
from foe_ranks import CONFIG

from fomoe.models import FoE
from fomoe.models.foe.ranks import members_of_a_group, node_of_rank


@pytest.mark.parametrize(
    ("num_ranks", "members"), [(1, 1), (2, 1), (4, 1), (8, 2), (12, 3), (16, 4)]
)
def test_whole_groups_on_a_rank_or_whole_ranks_on_a_group(num_ranks, members):
    assert members_of_a_group(num_ranks, CONFIG) == members


@pytest.mark.parametrize(
    ("num_ranks", "sentence"),
    [
        (3, "expected a divisor or a multiple of the model's 4 groups, got 3"),
        (6, "expected a divisor or a multiple of the model's 4 groups, got 6"),
        (20, "expected at most 16, one for each expert, got 20"),
    ],
)
def test_other_numbers_of_ranks_are_refused(num_ranks, sentence):
    with pytest.raises(ValueError, match=sentence):
        members_of_a_group(num_ranks, CONFIG)


def test_residents_beside_ranks_are_refused():
    with pytest.raises(ValueError, match="expected none beside ranks"):
        FoE(replace(CONFIG), [()] * 3, ranks=object())


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ([4, 2], "nodes: expected 8 ranks in all, got 6"),
        ([3, 5], "expected the 2 ranks of a group on one node, got ranks 2 to 3 on two"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(nodes, sentence):
    with pytest.raises(ValueError, match=sentence):
        node_of_rank(nodes, 8, 2)
    assert node_of_rank([2, 6], 8, 2) == [0, 0, 1, 1, 1, 1, 1, 1]
