# SPDX-License-Identifier: Apache-2.0
"""Which rank belongs to which site, and the groups in which ranks talk to each other.

Ranks of torch.distributed are numbered anew, site by site: rank ``site * ranks_per_site`` is the
leader of a site, the one that meets the other sites, and rank 0 does the coordinator's work.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from fomoe.errors import UserError
from fomoe.federation.config import Config
from fomoe.federation.launch.store import Store

__all__ = [
    "SECONDS_IN_A_COLLECTIVE",
    "Membership",
    "Newcomer",
    "Seat",
    "assign",
    "join",
    "threads_of_a_rank",
]

SECONDS_IN_A_COLLECTIVE = 7 * 86400.0
"""Heartbeats say who is lost, never a collective: a site may wait for a slower one all day."""


@dataclass(frozen=True)
class Newcomer:
    """What a rank of torchrun says of itself: its machine's number, and how many there are; the
    site it was told to belong to, if any; its process id."""

    machine: int
    machines: int
    site: int | None
    process: int


@dataclass(frozen=True)
class Seat:
    """The place of a rank: in which site, and which rank of it."""

    site: int
    rank_in_site: int

    def rank(self, ranks_per_site: int) -> int:
        return self.site * ranks_per_site + self.rank_in_site


@dataclass(frozen=True)
class Membership:
    """A rank's place among all others.

    ``leaders`` is the group of the first ranks of all sites, whose rank in it is the site; None on
    other ranks. ``inside`` is the group of this site's ranks; None for a site of one rank.
    """

    seat: Seat
    sites: int
    ranks_per_site: int
    leaders: dist.ProcessGroup | None
    inside: dist.ProcessGroup | None

    @property
    def site(self) -> int:
        return self.seat.site

    @property
    def rank(self) -> int:
        return self.seat.rank(self.ranks_per_site)


def assign(newcomers: Sequence[Newcomer], sites: int, ranks_per_site: int) -> list[Seat]:
    """Give every rank, in torchrun's order, its seat.

    Its site is the one it was told; else, where there are as many machines as sites, the number of
    its machine; else the rank divided by ``ranks_per_site``.

    Raises
    ------
    UserError
        The ranks do not fill the sites.
    """
    needed = sites * ranks_per_site
    if len(newcomers) != needed:
        raise UserError(
            f"torchrun started {len(newcomers)} ranks, but federation.sites = {sites} times "
            f"federation.ranks_per_site = {ranks_per_site} needs {needed}"
        )
    members: list[int] = [0] * sites
    seats = []
    for rank, newcomer in enumerate(newcomers):
        site = _site(rank, newcomer, sites, ranks_per_site)
        seats.append(Seat(site, members[site]))
        members[site] += 1
    for site, count in enumerate(members):
        if count != ranks_per_site:
            raise UserError(
                f"site {site} has {count} ranks of torchrun, but "
                f"federation.ranks_per_site = {ranks_per_site}: check --site and --nproc-per-node "
                "on every machine"
            )
    return seats


def _site(rank: int, newcomer: Newcomer, sites: int, ranks_per_site: int) -> int:
    if newcomer.site is None:
        return newcomer.machine if newcomer.machines == sites else rank // ranks_per_site
    if not 0 <= newcomer.site < sites:
        raise UserError(
            f"--site {newcomer.site} does not exist: with federation.sites = {sites} "
            f"it is from 0 to {sites - 1}"
        )
    return newcomer.site


def join(
    store: Store, seat: Seat, sites: int, ranks_per_site: int, device: str = "cpu"
) -> Membership:
    """Form the groups, together with all other ranks; gloo, for tensors in host memory.

    ``device`` is the ``training.device`` of this rank's site. The group inside a site of GPUs is
    also for tensors on these, with NCCL.
    """
    timeout = datetime.timedelta(seconds=SECONDS_IN_A_COLLECTIVE)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=seat.rank(ranks_per_site),
        world_size=sites * ranks_per_site,
        timeout=timeout,
    )
    # Every rank has to take part in making every group, its own or not.
    groups = [
        dist.new_group(
            [Seat(site, r).rank(ranks_per_site) for r in range(ranks_per_site)],
            timeout,
            backend="gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        )
        for site in range(sites)
        if ranks_per_site > 1
    ]
    leaders = dist.new_group([Seat(site, 0).rank(ranks_per_site) for site in range(sites)], timeout)
    return Membership(
        seat=seat,
        sites=sites,
        ranks_per_site=ranks_per_site,
        leaders=leaders if seat.rank_in_site == 0 else None,
        inside=groups[seat.site] if groups else None,
    )


def threads_of_a_rank(config: Config, ranks_here: int) -> int:
    """CPU threads of every rank: as set, or an even share of this machine's cores."""
    return config.training.threads or max(1, (os.cpu_count() or 1) // ranks_here)
