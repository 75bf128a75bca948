# SPDX-License-Identifier: Apache-2.0
"""Which rank is at which site, and through whom the sites talk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

__all__ = ["LINK_CLASSES", "LinkClass", "Stage", "Topology"]

Stage = Literal["intra_node", "inter_site"]
LinkClass = Literal["local", "intra_node", "inter_site"]
LINK_CLASSES: tuple[LinkClass, ...] = ("local", "intra_node", "inter_site")


@dataclass(frozen=True)
class Topology:
    """Ranks, numbered site by site from 0; a site is where ranks share a fast network.

    Parameters
    ----------
    ranks_per_site : Sequence[int]
        One number per site, each at least 1; they may differ.

    Raises
    ------
    ValueError
        There is no site, or one has no rank.
    """

    ranks_per_site: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks_per_site", tuple(map(int, self.ranks_per_site)))
        if not self.ranks_per_site:
            raise ValueError("ranks_per_site: expected at least one site, got none")
        for site, ranks in enumerate(self.ranks_per_site):
            if ranks < 1:
                raise ValueError(f"ranks_per_site: expected at least 1, got {ranks} of site {site}")

    @property
    def num_sites(self) -> int:
        return len(self.ranks_per_site)

    @property
    def num_ranks(self) -> int:
        return sum(self.ranks_per_site)

    @cached_property
    def _first(self) -> list[int]:
        return [0, *accumulate(self.ranks_per_site)]

    @cached_property
    def _sites(self) -> list[int]:
        return [site for site, ranks in enumerate(self.ranks_per_site) for _ in range(ranks)]

    def site_of(self, rank: int) -> int:
        return self._sites[rank]

    def ranks_of(self, site: int) -> range:
        return range(self._first[site], self._first[site + 1])

    def gateway(self, rank: int, site: int) -> int:
        """The rank of another site that takes what ``rank`` sends there, and sends it on.

        The one with the same place in its site, modulo its size: our choice, so that every rank of
        a site uses its own way out.
        """
        place = rank - self._first[self.site_of(rank)]
        return self._first[site] + place % self.ranks_per_site[site]

    def sources(self, rank: int) -> list[int]:
        """The ranks of other sites that send to ``rank``, ascending."""
        here = self.site_of(rank)
        return [
            other
            for other in range(self.num_ranks)
            if self.site_of(other) != here and self.gateway(other, here) == rank
        ]

    def group(self, rank: int, stage: Stage) -> list[int]:
        """The ranks that ``rank`` makes the calls of a stage together with, ascending.

        Between sites these are all that it reaches from gateway to gateway: with sites of equal
        size, the ranks of the same place.
        """
        if stage == "intra_node":
            return list(self.ranks_of(self.site_of(rank)))
        reached, waiting = {rank}, [rank]
        while waiting:
            member = waiting.pop()
            here = self.site_of(member)
            others = [self.gateway(member, s) for s in range(self.num_sites) if s != here]
            new = {*others, *self.sources(member)} - reached
            reached |= new
            waiting += new
        return sorted(reached)

    def link(self, one: int, other: int) -> LinkClass:
        if one == other:
            return "local"
        return "intra_node" if self.site_of(one) == self.site_of(other) else "inter_site"
