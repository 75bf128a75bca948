# SPDX-License-Identifier: Apache-2.0
"""The plan of the two-stage all-to-all as Python sees it."""

import pytest
import torch

from fomoe import ops
from fomoe._C import all_to_all_plan

ROW = {"top_k": 2, "width": 4, "element_bytes": 2, "weight_bytes": 4}


def test_a_token_crosses_once_for_two_experts_of_a_remote_site():
    # Rank 0 alone in its site; ranks 1 and 2 in the other own an expert each.
    plan = all_to_all_plan([1, 2], [1, 2], [[0, 1], [], []], **ROW)
    source, gateway, other = plan["ranks"]
    assert source["inter_site"] == [{"destination": 1, "rows": [0]}]
    assert source["inter_site_group"] == [0, 1, 2]
    assert source["counts"] == [0, 1, 0, 1, 1]
    assert gateway["held"] == gateway["arrived"] == other["arrived"] == [(0, 0)]
    assert gateway["intra_node"] == [
        {"destination": 1, "rows": [0]},
        {"destination": 2, "rows": [0]},
    ]
    assert gateway["owners"] == [[1, 2]]
    assert source["sites"] == [[1]]
    assert plan["hierarchical"]["dispatch"] == {"local": 24, "intra_node": 24, "inter_site": 24}
    assert plan["hierarchical"]["combine"] == {"local": 8, "intra_node": 8, "inter_site": 8}
    assert plan["flat"]["dispatch"] == {"local": 0, "intra_node": 0, "inter_site": 24}
    assert plan["flat"]["counts"] == {"local": 24, "intra_node": 16, "inter_site": 32}
    assert plan["deduplicated_minimum"] == 16


def test_row_lists_are_those_that_the_ops_find():
    ranks_per_site, experts, top_k = [2, 1, 3], 9, 3
    site_of_rank = [site for site, ranks in enumerate(ranks_per_site) for _ in range(ranks)]
    generator = torch.Generator().manual_seed(1)

    def draw(end, *shape):
        return torch.randint(-1, end, shape, generator=generator, dtype=torch.int32)

    owners, ids = draw(6, experts), [draw(experts, tokens, top_k) for tokens in (5, 0, 8, 3, 1, 6)]
    row = ROW | {"top_k": top_k}
    flat_ids = [of_rank.flatten().tolist() for of_rank in ids]
    plan = all_to_all_plan(ranks_per_site, owners.tolist(), flat_ids, **row)
    for rank, of_rank in enumerate(plan["ranks"]):
        site = site_of_rank[rank]
        remote = [-1 if o < 0 or site_of_rank[o] == site else site_of_rank[o] for o in owners]
        expected = [message["rows"] for message in of_rank["inter_site"]]
        assert rows_by_group(ids[rank], remote, 3, [s for s in range(3) if s != site]) == expected

        held = [ids[source][token].tolist() for source, token in of_rank["held"]]
        here = [-1 if o < 0 or site_of_rank[o] != site else int(o) for o in owners]
        held_ids = torch.tensor(held, dtype=torch.int32).reshape(-1, top_k)
        expected = [message["rows"] for message in of_rank["intra_node"]]
        assert rows_by_group(held_ids, here, 6, of_rank["intra_node_group"]) == expected


def rows_by_group(ids, group_of_expert, num_groups, groups):
    """Rows for each of the groups, ascending, from the ops."""
    of_expert = torch.tensor(group_of_expert, dtype=torch.int32)
    destinations = ops.destinations(ids, of_expert, num_groups)
    routing = ops.route(destinations, torch.arange(num_groups, dtype=torch.int32), num_groups)
    rows = routing.row_to_slot // max(1, destinations.shape[1])
    bounds = routing.offsets.tolist()
    return [rows[bounds[group] : bounds[group + 1]].tolist() for group in groups]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks_per_site": [1, 0]}, "ranks_per_site must be at least 1, got 0 for site 1"),
        ({"owners": [0, 7]}, r"owners must be in \[-1, 2\), got rank 7 for expert 1"),
        ({"ids": [[0, 1]]}, "ids must be given for 2 ranks, got 1"),
        ({"ids": [[0, 1], [0]]}, "ids must be 2 per token, got 1 on rank 1"),
        ({"ids": [[0, 2], []]}, r"ids must be in \[-1, 2\), got 2 on rank 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_rank_and_value(change, message):
    arguments = {"ranks_per_site": [1, 1], "owners": [0, 1], "ids": [[0, 1], [1, 0]]} | ROW
    with pytest.raises(ValueError, match=message):
        all_to_all_plan(**(arguments | change))
