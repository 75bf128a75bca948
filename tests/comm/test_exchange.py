# SPDX-License-Identifier: Apache-2.0
"""The hierarchical all-to-all over threads: what arrives, what comes back, and the gradients."""

from collections import Counter

import pytest
import torch
from layers import (
    DIM,
    TOP_K,
    TOPOLOGIES,
    exchanged,
    expected,
    generator,
    num_tokens_of,
    random_ids,
    random_owners,
)

from fomoe._C import all_to_all_plan
from fomoe.comm import ExpertExchange, LoopbackTransport, Topology, run_ranks


def test_a_row_crosses_once_per_site_and_reaches_every_owner():
    # Two sites of two ranks; rank r owns expert r. The token of rank 0 goes to experts 1, 2 and 3:
    # one row to its gateway at site 1, rank 2, which keeps one copy and gives rank 3 another.
    def program(transport):
        exchange = ExpertExchange(transport, [0, 1, 2, 3])
        num_tokens = 1 if transport.rank == 0 else 0
        x = torch.full((num_tokens, 2), 7.0)
        ids = torch.tensor([[1, 2, 3]], dtype=torch.int32)[:num_tokens]
        arrived = exchange.dispatch(x, ids, torch.ones(num_tokens, 3))
        back = exchange.combine(arrived.rows * (transport.rank + 1), arrived.trip)
        return arrived, back, dict(exchange.bytes_sent)

    results = run_ranks(Topology([2, 2]), program)
    assert [len(arrived.rows) for arrived, _, _ in results] == [0, 1, 1, 1]
    assert results[3][0].ids.tolist() == [[1, 2, 3]]
    # 7 * 2 from rank 1, 7 * 3 + 7 * 4 from site 1.
    assert results[0][1].tolist() == [[63.0, 63.0]]
    row, ids_and_weights, counts = 2 * 4, 3 * (4 + 4), (3 + 2 + 4) * 8
    assert results[0][2]["inter_site"] == row + ids_and_weights + 2 * counts
    assert results[2][2]["inter_site"] == row + 2 * counts  # on the way back, summed over its site
    assert results[2][2]["intra_node"] == row + ids_and_weights + counts
    assert results[2][2]["local"] == row + ids_and_weights + row


@pytest.mark.parametrize("sites", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_gives_the_sums_that_one_process_would(sites, dtype):
    for seed in range(6):
        topology = Topology(sites)
        owners = random_owners(topology, seed, ghosts=seed % 2 == 0)

        def program(transport, seed=seed, owners=owners):
            inputs = _inputs(transport.rank, seed, dtype)
            _, result = exchanged(transport, owners, *inputs)
            return result, expected(owners, *inputs)

        for result, right in run_ranks(topology, program):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            torch.testing.assert_close(result, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sites", TOPOLOGIES, ids=str)
def test_gradients_are_those_of_one_process(sites):
    for seed in range(4):
        topology = Topology(sites)
        owners = random_owners(topology, seed, ghosts=True)

        def program(transport, seed=seed, owners=owners):
            x, ids, weights = _inputs(transport.rank, seed, torch.float64)
            upstream = torch.randn(x.shape, generator=generator(seed + 50), dtype=x.dtype)
            gradients = []
            for function in (lambda *a: exchanged(transport, owners, *a)[1],
                             lambda *a: expected(owners, *a)):  # fmt: skip
                leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
                y = function(leaves[0], ids, leaves[1])
                gradients.append(torch.autograd.grad(y, leaves, upstream, materialize_grads=True))
            return gradients

        for ours, right in run_ranks(topology, program):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_go_the_same_way():
    topology, owners = Topology([2, 1]), [0, 1, 2, 2, 1, 0, -1, 1]

    def program(transport):
        x, ids, weights = _inputs(transport.rank, 3, torch.float64)
        second = []
        for function in (lambda *a: exchanged(transport, owners, *a)[1],
                         lambda *a: expected(owners, *a)):  # fmt: skip
            leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            y = function(leaves[0], ids, leaves[1])
            first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
            second.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
        return second

    for ours, right in run_ranks(topology, program):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


def test_a_rank_that_fails_ends_the_others():
    def program(transport: LoopbackTransport):
        if transport.rank == 1:
            raise ValueError("rank 1 has had enough")
        return exchanged(transport, [0] * 8, *_inputs(transport.rank, 0, torch.float32))

    with pytest.raises(ValueError, match="rank 1 has had enough"):
        run_ranks(Topology([3]), program)


def _inputs(rank, seed, dtype):
    num_tokens = num_tokens_of(rank, seed)
    source = generator(seed * 10 + rank)
    x = torch.randn(num_tokens, DIM, generator=source, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(num_tokens, TOP_K, generator=source, dtype=torch.float64).to(wide)
    return x, random_ids(num_tokens, seed * 10 + rank), weights


@pytest.mark.parametrize("sites", TOPOLOGIES, ids=str)
def test_bytes_and_rows_are_those_of_the_plan(sites):
    topology = Topology(sites)
    for seed in range(3):
        owners = random_owners(topology, seed, ghosts=True)
        inputs = [_inputs(rank, seed, torch.float32) for rank in range(topology.num_ranks)]

        def program(transport, owners=owners, inputs=inputs):
            exchange = ExpertExchange(transport, owners)
            arrived = exchange.dispatch(*inputs[transport.rank])
            exchange.combine(arrived.rows, arrived.trip)
            return arrived, exchange.bytes_sent

        plan = all_to_all_plan(
            list(sites), owners, [ids.flatten().tolist() for _, ids, _ in inputs],
            top_k=TOP_K, width=DIM, element_bytes=4, weight_bytes=4,
        )  # fmt: skip
        results = run_ranks(topology, program)
        total = sum((sent for _, sent in results), Counter())
        steps = plan["hierarchical"]
        ranks = range(topology.num_ranks)
        for link in ("local", "intra_node", "inter_site"):
            # Beside their counts, ranks say in three numbers what their rows are like.
            pairs = sum(topology.link(a, b) == link for a in ranks for b in ranks if a != b)
            counts = steps["counts"][link] + 24 * pairs if link != "local" else 0
            assert total[link] == steps["dispatch"][link] + steps["combine"][link] + counts
        for (arrived, _), planned in zip(results, plan["ranks"], strict=True):
            rows = [inputs[source][0][token] for source, token in planned["arrived"]]
            assert [row.tolist() for row in arrived.rows] == [row.tolist() for row in rows]
