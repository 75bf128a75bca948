# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import UserError
from fomoe.federation.placement import fixed


def test_holders_walk_around_the_sites_and_shift_by_one_per_layer():
    placement = fixed(2, 4, sites=4, overlap=2)
    assert [placement.holders(0, e) for e in range(4)] == [(0, 1), (2, 3), (0, 1), (2, 3)]
    assert [placement.holders(1, e) for e in range(4)] == [(1, 2), (0, 3), (1, 2), (0, 3)]
    assert placement.residents(0) == [(0, 2), (1, 3)]
    assert [placement.owner(0, e) for e in range(4)] == [0, 2, 1, 3]


@pytest.mark.parametrize(("sites", "overlap", "num_experts"), [(3, 2, 6), (4, 3, 8), (4, 2, 16)])
def test_sites_own_about_equally_many_experts(sites, overlap, num_experts):
    placement = fixed(3, num_experts, sites, overlap)
    owned = [placement.owner(layer, e) for layer in range(3) for e in range(num_experts)]
    counts = [owned.count(site) for site in range(sites)]
    assert max(counts) - min(counts) <= 2


@given(
    sites=st.integers(1, 9), overlap=st.integers(1, 9), groups=st.integers(1, 5),
    layers=st.integers(1, 4),
)  # fmt: skip
def test_every_expert_has_overlap_holders_and_every_site_equally_many(
    sites, overlap, groups, layers
):
    if overlap > sites:
        overlap = sites
    num_experts = sites * groups
    placement = fixed(layers, num_experts, sites, overlap)
    residents = [placement.residents(site) for site in range(sites)]
    for layer in range(layers):
        assert {len(residents[s][layer]) for s in range(sites)} == {num_experts * overlap // sites}
        for expert in range(num_experts):
            holders = placement.holders(layer, expert)
            assert len(set(holders)) == overlap
            assert placement.owner(layer, expert) in holders
            assert holders == tuple(s for s in range(sites) if expert in residents[s][layer])


def test_more_holders_than_sites_is_refused_by_name():
    with pytest.raises(UserError, match=r"federation.overlap .* \(4\), got 5"):
        fixed(1, 8, sites=4, overlap=5)


def test_experts_that_cannot_be_spread_evenly_are_refused():
    with pytest.raises(UserError, match="must be divisible by sites"):
        fixed(1, 6, sites=4, overlap=1)
