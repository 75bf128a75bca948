# SPDX-License-Identifier: Apache-2.0
"""How many rows travel where: everything that follows from the counts all ranks exchange first."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from fomoe.comm.topology import Stage, Topology

__all__ = ["Counts", "FixedCounts", "RowCounts"]


class Counts(ABC):
    """The rows that one rank sends and receives in both stages, on the way there."""

    topology: Topology
    rank: int

    def sent(self, stage: Stage) -> list[int]:
        """Rows from here to every member of the stage's group."""
        return [self._rows(stage, self.rank, to) for to in self.topology.group(self.rank, stage)]

    def received(self, stage: Stage) -> list[int]:
        """Rows from every member of the stage's group."""
        members = self.topology.group(self.rank, stage)
        return [self._rows(stage, source, self.rank) for source in members]

    @abstractmethod
    def _rows(self, stage: Stage, source: int, to: int) -> int: ...


class RowCounts(Counts):
    """Counts that follow from the data.

    Parameters
    ----------
    topology : Topology
    rank : int
    matrix : Sequence[Sequence[int]]
        Of every rank (W rows): how many rows it sends to the gateway of each site (S), and how many
        of its tokens have an expert on each rank (W).
    """

    def __init__(self, topology: Topology, rank: int, matrix: Sequence[Sequence[int]]) -> None:
        self.topology = topology
        self.rank = rank
        self.matrix = matrix

    def _rows(self, stage: Stage, source: int, to: int) -> int:
        topology = self.topology
        site = topology.site_of(to)
        if stage == "intra_node":
            origins = [source, *topology.sources(source)]
            return sum(self.matrix[origin][topology.num_sites + to] for origin in origins)
        if topology.site_of(source) == site or topology.gateway(source, site) != to:
            return 0
        return self.matrix[source][site]


class FixedCounts(Counts):
    """Counts for messages of a fixed size, whatever the data.

    Parameters
    ----------
    topology : Topology
    rank : int
    num_tokens : int
        T, the same on all ranks.
    factor : float
        The part of its rows, the T tokens and then the held rows, that a message has room for.
    """

    def __init__(self, topology: Topology, rank: int, num_tokens: int, factor: float) -> None:
        self.topology = topology
        self.rank = rank
        self.capacity: dict[Stage, int] = {"inter_site": math.ceil(factor * num_tokens)}
        num_sources = max(len(topology.sources(r)) for r in topology.group(rank, "intra_node"))
        num_held = num_tokens + num_sources * self.capacity["inter_site"]
        self.capacity["intra_node"] = math.ceil(factor * num_held)

    def _rows(self, stage: Stage, source: int, to: int) -> int:
        if stage == "inter_site" and source not in self.topology.sources(to):
            return 0
        return self.capacity[stage]
