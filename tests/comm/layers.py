# SPDX-License-Identifier: Apache-2.0
"""Random routings over ranks, and the sums that an exchange has to give."""

import random

import torch
from torch import Tensor

from fomoe.comm import ExpertExchange, Topology, Transport

TOPOLOGIES = [(1,), (4,), (2, 2), (1, 1, 1, 1), (3, 1), (1, 3), (2, 1, 3)]
NUM_EXPERTS, TOP_K, DIM = 8, 3, 5


def random_owners(topology: Topology, seed: int, ghosts: bool) -> list[int]:
    """A rank per expert, about a quarter of them ghosts if there shall be some."""
    rng = random.Random(seed)
    return [
        -1 if ghosts and rng.random() < 0.25 else rng.randrange(topology.num_ranks)
        for _ in range(NUM_EXPERTS)
    ]


def random_ids(num_tokens: int, seed: int) -> Tensor:
    """(T, K): distinct experts, and now and then none."""
    rng = random.Random(seed)
    rows = [rng.sample(range(NUM_EXPERTS), TOP_K) for _ in range(num_tokens)]
    ids = torch.tensor(rows, dtype=torch.int32).view(num_tokens, TOP_K)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator(seed)) < 0.1, -1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def num_tokens_of(rank: int, seed: int) -> int:
    """Between 0 and 9, and on some ranks none."""
    return random.Random(seed * 100 + rank).choice([0, 1, 4, 9])


def exchanged(
    transport: Transport,
    owners: list[int],
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    capacity_factor: float | None = None,
) -> tuple[ExpertExchange, Tensor]:
    """Through the exchange, where expert e multiplies by e + 1."""
    exchange = ExpertExchange(transport, owners, capacity_factor)
    arrived = exchange.dispatch(x, ids, weights)
    mine = torch.tensor([*(owner == transport.rank for owner in owners), False])
    factors = torch.where(mine[arrived.ids.long()], arrived.ids + 1, 0).to(arrived.weights.dtype)
    scale = (arrived.weights * factors).sum(1, keepdim=True)
    return exchange, exchange.combine(arrived.rows * scale.to(x.dtype), arrived.trip)


def expected(owners: list[int], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same without any exchange."""
    present = torch.tensor([*(owner >= 0 for owner in owners), False])
    factors = torch.where(present[ids.long()], ids + 1, 0).to(weights.dtype)
    return x * (weights * factors).sum(1, keepdim=True).to(x.dtype)
