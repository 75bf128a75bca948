# SPDX-License-Identifier: Apache-2.0
"""Messages of a fixed size: no call that waits, the same sums while there is room, else drops."""

import pytest
import torch
from layers import (
    DIM,
    TOP_K,
    TOPOLOGIES,
    exchanged,
    expected,
    generator,
    random_ids,
    random_owners,
)

from fomoe.comm import ExpertExchange, Topology, run_ranks
from fomoe.comm.padding import pad, unpad
from fomoe.ops import route

NUM_TOKENS = 6


@pytest.mark.parametrize("sites", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("ghosts", [False, True], ids=["all owned", "ghosts"])
def test_with_room_for_every_row_nothing_is_different(sites, ghosts):
    topology = Topology(sites)
    owners = random_owners(topology, 5, ghosts)

    def program(transport):
        x, ids, weights = _inputs(transport.rank)
        found = []
        for function in (
            lambda *a: exchanged(transport, owners, *a, capacity_factor=1.0),
            lambda *a: (None, expected(owners, *a)),
        ):
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            exchange, y = function(leaves[0], ids, leaves[1])
            found.append([y, *torch.autograd.grad(y.pow(3).sum(), leaves)])
            if exchange is not None:
                assert exchange.num_drops == 0
        return found

    for ours, right in run_ranks(topology, program):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_rows_without_room_are_dropped_and_counted():
    # Two sites of one rank; all four tokens of rank 0 go to rank 1, which has room for two of them.
    def program(transport):
        exchange = ExpertExchange(transport, [0, 1], capacity_factor=0.5)
        x = torch.arange(1.0, 5.0)[:, None].requires_grad_()
        ids = torch.full((4, 1), 1 - transport.rank, dtype=torch.int32)
        arrived = exchange.dispatch(x, ids, torch.ones(4, 1))
        y = exchange.combine(arrived.rows * (arrived.ids >= 0), arrived.trip)
        y.sum().backward()
        return y.flatten().tolist(), x.grad.flatten().tolist(), int(exchange.num_drops)

    for y, gradient, drops in run_ranks(Topology([1, 1]), program):
        assert y == [1.0, 2.0, 0.0, 0.0]
        assert gradient == [1.0, 1.0, 0.0, 0.0]
        assert drops == 2


def test_after_the_first_time_no_call_waits_for_the_device():
    def program(transport):
        exchange = ExpertExchange(transport, random_owners(transport.topology, 1, False), 1.0)
        sizes = []
        for step in range(3):
            if step == 1:
                transport.gather_counts = None
            x, ids, weights = _inputs(transport.rank + 10 * step)
            arrived = exchange.dispatch(x, ids, weights)
            exchange.combine(arrived.rows, arrived.trip)
            sizes.append(len(arrived.rows))
        return set(sizes)

    assert all(len(sizes) == 1 for sizes in run_ranks(Topology([2, 1]), program))


def test_ranks_with_different_numbers_of_tokens_are_refused_before_a_row_travels():
    def program(transport):
        exchange = ExpertExchange(transport, [0, 1], capacity_factor=1.0)
        transport.all_to_all = None
        rows = 2 + transport.rank
        with pytest.raises(ValueError, match="number of tokens must be the same on all ranks"):
            exchange.dispatch(
                torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1)
            )

    run_ranks(Topology([2]), program)


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_a_factor_that_is_no_part_is_refused(factor):
    def program(transport):
        with pytest.raises(ValueError, match="expected above 0 and at most 1"):
            ExpertExchange(transport, [0], capacity_factor=factor)

    run_ranks(Topology([1]), program)


def test_padding_and_back():
    ids = torch.tensor([[2], [0], [-1], [2]], dtype=torch.int32)
    routing = route(ids, torch.arange(3, dtype=torch.int32), 3)
    rows = torch.tensor([[10.0], [20.0], [30.0], [-1.0]])  # of groups 0, 2, 2, none
    filler, all_groups = torch.tensor([7.0]), torch.arange(3)
    padded = pad(rows, routing, all_groups, 2, filler)
    assert padded.flatten().tolist() == [10, 7, 7, 7, 20, 30]
    assert unpad(padded, routing, all_groups, 2)[:3].equal(rows[:3])
    without_group_0 = pad(rows, routing, all_groups[1:], 2, filler)
    assert without_group_0.flatten().tolist() == [7, 7, 20, 30]


def _inputs(rank):
    source = generator(rank)
    x = torch.randn(NUM_TOKENS, DIM, generator=source, dtype=torch.float64)
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=source, dtype=torch.float64)
    return x, random_ids(NUM_TOKENS, rank), weights
