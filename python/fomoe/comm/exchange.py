# SPDX-License-Identifier: Apache-2.0
"""The hierarchical all-to-all: tokens to the ranks that own their experts, and back.

Between sites a row travels once per destination site, to a gateway there; inside a site once per
rank that owns some of its experts. On the way back the rows of a token are summed inside a site
before they cross. Our choice, after the two-level dispatch of DeepEP and Tutel's 2DH; FoMoE leaves
expert parallelism across sites as the baseline it lacks (arXiv 2606.19025).

T tokens of this rank, D width, K experts per token, S sites, W ranks, R ranks of this site, N rows
that arrive here. Held rows are the T tokens of this rank and those that arrived from other sites,
H together.
"""

import itertools
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fomoe.comm.counts import Counts, FixedCounts, RowCounts
from fomoe.comm.message import RowFormat
from fomoe.comm.padding import pad, unpad
from fomoe.comm.topology import LinkClass, Stage
from fomoe.comm.transport import Transport
from fomoe.ops import Routing, combine, destinations, permute, route
from fomoe.ops._checks import FLOATS

__all__ = ["Dispatched", "ExpertExchange", "Trip", "exchange_of"]

_exchanges: "weakref.WeakValueDictionary[int, ExpertExchange]" = weakref.WeakValueDictionary()
_handles = itertools.count()
_Group = Literal["other site", "rank", "rank here"]
_BY_SIZE = (torch.float64, torch.float32, torch.bfloat16)


class Trip(NamedTuple):
    """Which rows went where: what the way back, and the gradients, need to know."""

    to_sites: Routing
    """Of the T tokens, with a slot per site: which rows left for the gateway of which site."""
    to_ranks: Routing
    """Of the H held rows, with a slot per rank of this site."""
    counts: Tensor
    """(W, S + W) int64 on the CPU, see :class:`fomoe.comm.counts.RowCounts`; with messages of a
    fixed size, empty."""


class Dispatched(NamedTuple):
    """What arrived at a rank."""

    rows: Tensor  # (N, D), differentiable
    ids: Tensor  # (N, K) int32: global expert ids of the token, those of other ranks too
    weights: Tensor  # (N, K), differentiable
    trip: Trip


class ExpertExchange:
    """One rank's part in the all-to-all of one layer; all ranks make the same calls.

    Parameters
    ----------
    transport : Transport
        This rank's way to the others; says which rank it is and what the sites are.
    owners : Sequence[int]
        The rank that owns each expert; -1: nobody here, a ghost, whose path is skipped.
    capacity_factor : float, optional
        Messages of a fixed size, with room for this part of the rows that a rank has, from above 0
        to 1: sizes then depend on no data, and nothing waits for the device. Rows without room are
        drops, their experts are skipped there. All ranks must have the same number of tokens.
        None: every row, however many, after an exchange of counts.

    Raises
    ------
    ValueError
        An owner is not a rank, or the capacity factor out of range.
    """

    def __init__(
        self, transport: Transport, owners: Sequence[int], capacity_factor: float | None = None
    ) -> None:
        if capacity_factor is not None and not 0 < capacity_factor <= 1:
            raise ValueError(
                f"capacity_factor: expected above 0 and at most 1, got {capacity_factor}"
            )
        self.capacity_factor = capacity_factor
        self.num_drops: Tensor | None = None
        """() int64: rows without room since the beginning; None before the first, or without a
        capacity factor."""
        self._has_compared = False
        self.transport = transport
        self.topology = transport.topology
        self.rank = transport.rank
        self.owners = tuple(map(int, owners))
        for expert, owner in enumerate(self.owners):
            if not -1 <= owner < self.topology.num_ranks:
                raise ValueError(
                    f"owners: expected ranks from 0 to {self.topology.num_ranks - 1}, or -1, "
                    f"got {owner} of expert {expert}"
                )
        self.bytes_sent: Counter[LinkClass] = Counter()
        """Rows with their ids and weights, and counts, since the beginning, by link."""
        self.seconds = 0.0
        """That the host has spent in calls of the transport, waiting for other ranks included."""
        self.handle = next(_handles)
        _exchanges[self.handle] = self
        self._constants: dict[tuple[_Group | Stage, torch.device], Tensor] = {}

    @property
    def experts(self) -> tuple[int, ...]:
        """Ids of those this rank owns, ascending."""
        return tuple(e for e, owner in enumerate(self.owners) if owner == self.rank)

    @property
    def all_experts(self) -> tuple[int, ...]:
        """Ids of those that some rank owns, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners) if owner >= 0)

    def __deepcopy__(self, memo: object) -> "ExpertExchange":
        return self  # a copy of a layer talks to the same ranks

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Dispatched:
        """Send every token to the ranks that own its experts, once to each.

        Parameters
        ----------
        x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
            T may differ between ranks and be 0; D and the dtypes may not differ.
        ids : Tensor, (T, K), int32
            Global expert ids, or -1.
        weights : Tensor, (T, K), float64 for float64 x, else float32

        Returns
        -------
        Dispatched
            Rows by the member of this site that sent them. Differentiable in x and weights.

        Raises
        ------
        CommunicationError
            Another rank failed.
        ValueError
            D, K, the dtype, or with a capacity factor T, is not the same on all ranks; raised on
            all of them.
        """
        results = torch.ops.fomoe.all_to_all_dispatch(x, ids, weights, self.handle)
        rows, row_ids, row_weights, *tables, counts = results
        trip = Trip(Routing(*tables[:3]), Routing(*tables[3:]), counts)
        return Dispatched(rows, row_ids, row_weights, trip)

    def combine(self, rows: Tensor, trip: Trip) -> Tensor:
        """Bring rows (N, D) back: (T, D), for every token the sum of the rows it became.

        Sums run over ascending ranks inside a site, are rounded to the dtype of rows, then over
        ascending sites. Differentiable in rows.
        """
        tables = [*trip.to_sites, *trip.to_ranks]
        (summed,) = torch.ops.fomoe.all_to_all_combine([rows], tables, trip.counts, self.handle)
        return summed  # type: ignore[no-any-return]

    # ---- what the ops do --------------------------------------------------------------------

    def send(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[list[Tensor], Trip]:
        """x, ids and weights of the rows that arrive here, without gradients."""
        row = RowFormat.of([x, ids, weights])
        to_sites = self._routing(ids, "other site", x.shape[0])
        counts = self._exchange_counts(x, ids, to_sites)
        rows = self._rows(counts, x.shape[0])
        filler = row.pack([x.new_zeros(1, x.shape[1]), ids.new_full((1, ids.shape[1]), -1),
                           weights.new_zeros(1, weights.shape[1])])  # fmt: skip
        held = self._hold(row.pack([x, ids, weights]), to_sites, rows, filler[0])
        to_ranks = self._routing(row.unpack(held)[1], "rank here", x.shape[0])
        arrived = self._there("intra_node", held, to_ranks, rows, filler[0])
        return row.unpack(arrived), Trip(to_sites, to_ranks, counts)

    def send_again(self, parts: Sequence[Tensor], trip: Trip) -> list[Tensor]:
        """Parts (T, width) of tokens, the way their rows went: (N, width) each."""
        row, rows = RowFormat.of(parts), self._rows(trip.counts, parts[0].shape[0])
        message = row.pack(parts)
        filler = message.new_zeros(row.num_bytes)
        held = self._hold(message, trip.to_sites, rows, filler)
        return row.unpack(self._there("intra_node", held, trip.to_ranks, rows, filler))

    def send_back(self, parts: Sequence[Tensor], trip: Trip) -> list[Tensor]:
        """Parts (N, width) of the rows here, summed by token: (T, width) each."""
        num_tokens = trip.to_sites.slot_to_row.shape[0]
        rows = self._rows(trip.counts, num_tokens)
        held = self._back("intra_node", parts, trip.to_ranks, rows)
        if self.topology.num_sites == 1:
            return held
        mine = [part[:num_tokens] for part in held]
        theirs = [part[num_tokens:] for part in held]
        back = self._back("inter_site", theirs, trip.to_sites, rows)
        return [part + remote for part, remote in zip(mine, back, strict=True)]

    def _exchange_counts(self, x: Tensor, ids: Tensor, to_sites: Routing) -> Tensor:
        """What every rank sends, which takes the one call that waits for the device.

        All ranks say as well what their rows are like. With messages of a fixed size, that is all,
        and they say it once.
        """
        about = [x.shape[1], ids.shape[1], FLOATS.index(x.dtype)]
        if self.capacity_factor is not None:
            if not self._has_compared:
                mine = torch.tensor([*about, x.shape[0]], device=x.device)
                self._compare(self._gather(mine))
            self._has_compared = True
            return torch.empty(0, dtype=torch.int64)
        on_ranks = self._routing(ids, "rank", x.shape[0])
        mine = torch.tensor(about, device=x.device)
        everyone = self._gather(torch.cat([mine, to_sites.offsets.diff(), on_ranks.offsets.diff()]))
        self._compare(everyone[:, : len(about)])
        return everyone[:, len(about) :].clone(memory_format=torch.contiguous_format)

    def _gather(self, counts: Tensor) -> Tensor:
        for other in range(self.topology.num_ranks):
            if other != self.rank:
                self._count(self.topology.link(self.rank, other), counts.numel() * 8)
        begin = time.perf_counter()
        everyones = self.transport.gather_counts(counts)
        self.seconds += time.perf_counter() - begin
        return everyones

    def _compare(self, everyones: Tensor) -> None:
        """Refuse rows that differ between ranks, before the first of them is on its way."""
        names = ("width of x", "experts per token", "dtype of x", "number of tokens")
        for rank, theirs in enumerate(everyones.tolist()):
            for name, mine, other in zip(
                names, everyones[self.rank].tolist(), theirs, strict=False
            ):
                if mine != other:
                    if name == "dtype of x":
                        mine, other = FLOATS[mine], FLOATS[other]
                    raise ValueError(
                        f"all-to-all: the {name} must be the same on all ranks, "
                        f"got {mine} on rank {self.rank} and {other} on rank {rank}"
                    )

    def _hold(self, message: Tensor, to_sites: Routing, rows: Counts, filler: Tensor) -> Tensor:
        """The message with the rows that arrive from other sites after it."""
        if self.topology.num_sites == 1:
            return message
        return torch.cat([message, self._there("inter_site", message, to_sites, rows, filler)])

    def _there(
        self, stage: Stage, message: Tensor, routing: Routing, rows: Counts, filler: Tensor
    ) -> Tensor:
        """Rows of bytes along the routing; returns those that arrive."""
        packed = _permute_bytes(message, routing)
        if isinstance(rows, FixedCounts):
            targets = self._targets(stage, packed.device)
            packed = pad(packed, routing, targets, rows.capacity[stage], filler)
        sent = rows.sent(stage)
        return self._all_to_all(stage, packed[: sum(sent)], sent, rows.received(stage))

    def _back(
        self, stage: Stage, parts: Sequence[Tensor], routing: Routing, rows: Counts
    ) -> list[Tensor]:
        """Rows against the routing; returns their sums."""
        row = RowFormat.of(parts)
        back = self._all_to_all(stage, row.pack(parts), rows.received(stage), rows.sent(stage))
        # combine wants a row for every slot, and never reads those without one.
        if isinstance(rows, FixedCounts):
            targets = self._targets(stage, back.device)
            all_rows = unpad(back, routing, targets, rows.capacity[stage])
        else:
            all_rows = back.new_empty(routing.row_to_slot.shape[0], row.num_bytes)
            all_rows[: back.shape[0]] = back
        return [combine(part, None, routing) for part in row.unpack(all_rows)]

    def _all_to_all(
        self, stage: Stage, rows: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        width = rows.shape[1]
        members = self.topology.group(self.rank, stage)
        for member, count in zip(members, send, strict=True):
            self._count(self.topology.link(self.rank, member), count * width)
        if len(members) == 1:
            return rows
        begin = time.perf_counter()
        arrived = self.transport.all_to_all(
            stage,
            rows.reshape(-1),
            [count * width for count in send],
            [count * width for count in receive],
        )
        self.seconds += time.perf_counter() - begin
        return arrived.view(sum(receive), width)

    def _count(self, link: LinkClass, num_bytes: int) -> None:
        self.bytes_sent[link] += num_bytes

    def _rows(self, counts: Tensor, num_tokens: int) -> Counts:
        if self.capacity_factor is not None:
            return FixedCounts(self.topology, self.rank, num_tokens, self.capacity_factor)
        return RowCounts(self.topology, self.rank, counts.tolist())

    def _targets(self, stage: Stage, device: torch.device) -> Tensor:
        """Among the groups of a stage's routing, those that rows are sent to."""
        if (stage, device) not in self._constants:
            here = self.topology.site_of(self.rank)
            targets = list(range(len(self.topology.ranks_of(here))))
            if stage == "inter_site":
                targets = [site for site in range(self.topology.num_sites) if site != here]
            self._constants[stage, device] = torch.tensor(targets, device=device)
        return self._constants[stage, device]

    def _routing(self, ids: Tensor, group: _Group, num_tokens: int) -> Routing:
        """Rows by group, each with the tokens that have an expert there."""
        here = self.topology.site_of(self.rank)
        num_groups = {
            "other site": self.topology.num_sites,
            "rank": self.topology.num_ranks,
            "rank here": len(self.topology.ranks_of(here)),
        }[group]
        there = destinations(ids, self._group_of_expert(group, ids.device), num_groups)
        each = torch.arange(num_groups, dtype=torch.int32, device=ids.device)
        if self.capacity_factor is None or group == "rank":
            return route(there, each, num_groups)
        stage: Stage = "inter_site" if group == "other site" else "intra_node"
        rows = FixedCounts(self.topology, self.rank, num_tokens, self.capacity_factor)
        routing = route(there, each, num_groups, capacity=rows.capacity[stage])
        self._count_drops((there >= 0).sum() - routing.offsets[-1])
        return routing

    def _count_drops(self, number: Tensor) -> None:
        self.num_drops = number if self.num_drops is None else self.num_drops + number

    def _group_of_expert(self, group: _Group, device: torch.device) -> Tensor:
        if (group, device) not in self._constants:
            groups = [-1 if owner < 0 else self._group(group, owner) for owner in self.owners]
            self._constants[group, device] = torch.tensor(groups, dtype=torch.int32, device=device)
        return self._constants[group, device]

    def _group(self, group: _Group, owner: int) -> int:
        site, here = self.topology.site_of(owner), self.topology.site_of(self.rank)
        if group == "other site":
            return -1 if site == here else site
        if group == "rank here":
            return owner - self.topology.ranks_of(here).start if site == here else -1
        return owner


def exchange_of(handle: int) -> ExpertExchange:
    """The exchange with this ``handle``, which is all of it that an op can be given."""
    return _exchanges[handle]


def _permute_bytes(rows: Tensor, routing: Routing) -> Tensor:
    """permute, for rows of bytes: as elements of the largest size that a row is made of."""
    num_rows, width = rows.shape
    dtype = next(d for d in _BY_SIZE if width % d.itemsize == 0)
    elements = rows.view(-1).view(dtype).view(num_rows, width // dtype.itemsize)
    permuted = permute(elements, routing)
    return permuted.view(-1).view(torch.uint8).view(permuted.shape[0], width)
