# SPDX-License-Identifier: Apache-2.0
"""How bytes travel between sites: one member per site, all of whom make the same calls."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.comm.pairwise import all_to_all

__all__ = ["Bystander", "GroupTransport", "Transport"]


class Transport(Protocol):
    """One site's access to the others; tensors are in host memory."""

    site: int
    sites: int
    seconds: float
    """Spent in calls since the start, waiting for slower sites included."""

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Everyone's values, by site; all give equally many, each in the range of int64."""
        ...

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        """Send ``send[s]`` bytes of ``outbox`` to each site s, in order; ``inbox`` gets what comes.

        ``outbox`` is uint8 (sum(send),), ``inbox`` uint8 (sum(receive),), by site.
        """
        ...


class GroupTransport:
    """A torch.distributed group with one rank per site, by default all ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.site = dist.get_rank(group)
        self.sites = dist.get_world_size(group)
        self.seconds = 0.0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.sites)]
        begin = time.perf_counter()
        dist.all_gather(everyone, mine, group=self.group)
        self.seconds += time.perf_counter() - begin
        return [theirs.tolist() for theirs in everyone]

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        begin = time.perf_counter()
        all_to_all(inbox, outbox, receive, send, self.group)
        self.seconds += time.perf_counter() - begin


class Bystander:
    """In place of a transport on ranks that are not their site's leader: they meet nobody."""

    def __init__(self, site: int, sites: int) -> None:
        self.site = site
        self.sites = sites
        self.seconds = 0.0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        raise RuntimeError("only the leader of a site meets the other sites")

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        raise RuntimeError("only the leader of a site meets the other sites")
