# SPDX-License-Identifier: Apache-2.0
"""The meeting of the sites: contributions go to the owners, are averaged there, and come back.

Contributions travel to the owners in an uneven all-to-all, are summed there in ascending site id,
and the results come back the same way. A ring all-reduce could not do this: its order of summation
depends on the position in the ring.

Summed over the sites, one exchange sends ``2 (M - 1) b`` bytes for shared tensors of b encoded
bytes, ``2 (holders - 1) b`` for an expert's, and for a row of a full router ``contributors - 1``
times up and ``M - 1`` times down. No site ever receives a tensor of an expert it does not hold.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.federation.exchange.carried import Carried
from fomoe.federation.exchange.codec import Codec
from fomoe.federation.exchange.layout import Chunk, Layout, Part
from fomoe.federation.exchange.pieces import Piece
from fomoe.federation.exchange.results import Results
from fomoe.federation.exchange.transport import Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.memory import host_buffer

__all__ = ["Attendance", "Exchange", "Parcel", "Step", "is_finite", "weighted_mean"]

_REJECTED = -1

Step = Callable[[Chunk, Tensor, Tensor], None]
"""Overwrites the mean of a chunk with what is sent back; the third is memory of the same size."""


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is finite only if all its terms are, and is the fastest to compute; that of large finite
    # terms may overflow, but then the extremes tell.
    return math.isfinite(value.sum().item()) or all(
        math.isfinite(extreme.item()) for extreme in torch.aminmax(value)
    )


def weighted_mean(
    values: Iterable[Tensor], weights: Sequence[float], total: Tensor, work: Tensor
) -> Tensor:
    """``sum(w_i x_i) / sum(w_i)`` in the given order; a single value is copied.

    Products and sums are separate roundings and there is one division, so that the result is the
    same on every machine. One value is needed at a time. Source: FoMoE Algorithm 1 (mean over
    holders); weighting by tokens and the order are our choice.

    ``total`` receives the mean and is returned; ``work`` is memory of the same size.
    """
    remaining = iter(values)
    if len(weights) == 1:
        return total.copy_(next(remaining))
    torch.mul(next(remaining), weights[0], out=total)
    for value, weight in zip(remaining, weights[1:], strict=True):
        total.add_(torch.mul(value, weight, out=work))
    return total.div_(sum(weights))


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who takes part in a meeting: tokens by site, None for a site that was rejected."""

    tokens: tuple[int | None, ...]

    @property
    def rejected(self) -> tuple[int, ...]:
        return tuple(site for site, tokens in enumerate(self.tokens) if tokens is None)

    def contributors(self, chunk: Chunk) -> list[int]:
        """Who sends its values of a chunk, ascending; may be nobody."""
        return [site for site in chunk.contributors if self.tokens[site] is not None]

    def weights(self, sites: Iterable[int]) -> list[float]:
        return [float(self.tokens[site] or 0) for site in sites]


@dataclass(slots=True)
class Parcel:
    """A site's contributions, encoded; the owner's become the results.

    ``buffer``, uint8, has a place for all chunks of the site: ``owned`` are the first, ``slots``
    the others' by owner, of which ``send[s]`` bytes go to site s. ``is_finite`` says whether
    everything was finite before it was encoded.
    """

    buffer: Tensor
    owned: dict[Chunk, Tensor]
    slots: dict[tuple[int, Chunk], Tensor]
    send: list[int]
    is_finite: bool


class Exchange:
    """One site's side of the exchange, for the pieces of the tensors it has.

    A failed exchange leaves the caller's tensors untouched, and what a lossy codec loses counts
    only from :meth:`commit` on. Buffers are kept from meeting to meeting: mapping fresh memory
    takes longer than sending it.
    """

    def __init__(
        self, pieces: Sequence[Piece], transport: Transport, ledger: SiteLedger, codec: Codec
    ) -> None:
        self.pieces = pieces
        self.transport = transport
        self.ledger = ledger
        self.codec = codec
        self.site = transport.site
        self.layout = Layout(pieces, self.site, codec.alignment)
        self.owned = [piece for piece in pieces if piece.owner == self.site]
        layout = self.layout
        self.lost_up = Carried(layout, pieces, layout.num_elements, codec.dtype)
        self.lost_down = Carried(layout, self.owned, layout.num_owned, codec.dtype)
        self._buffers: dict[str, Tensor] = {}
        self._sizes = {chunk: codec.num_bytes(chunk.num_elements) for chunk in layout.chunks}
        self._owned_bytes = self._num_bytes(layout.owned)
        largest = max((chunk.num_elements for chunk in layout.chunks), default=0)
        self._work = torch.empty(3, largest, dtype=codec.dtype)

    def attend(self, tokens: int, *, rejected: bool = False) -> Attendance:
        """Tell everyone this site's weight, or that nobody should count its contribution."""
        everyone = self.transport.gather([_REJECTED if rejected else tokens])
        self.ledger.sent("tokens", 8 * (self.transport.sites - 1))
        return Attendance(tuple(None if n == _REJECTED else n for (n,) in everyone))

    def pack(
        self,
        values: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
        kind: str = "values",
    ) -> Parcel:
        """This site's contributions, encoded: its values by tensor name, which stay as they are.

        With ``start``, by how much the values are less than at the start. Parcels of one ``kind``
        share a buffer, and so do their results: the next one overwrites them.
        """
        buffer = self._buffer(kind, self._num_bytes(self.layout.chunks))
        owned = dict(zip(self.layout.owned, self._cut(buffer, self.layout.owned), strict=True))
        mine = [chunk for chunk in self.layout.chunks if self.site in chunk.contributors]
        to = self._by_site(lambda chunk: [chunk.owner], mine)
        slots, send = self._slots(self._of_others(buffer), to)
        finite = True
        for chunk in mine:
            slot = owned[chunk] if chunk.owner == self.site else slots[chunk.owner, chunk]
            finite = self._contribute(chunk, values, start, slot) and finite
        return Parcel(buffer, owned, slots, send, finite)

    def reduce(self, parcel: Parcel, attendance: Attendance, step: Step | None = None) -> Parcel:
        """Send what :meth:`pack` gave to the owners, if this site counts; then means, as results.

        ``step`` makes of every mean what is to be sent back. Returns the parcel.
        """
        if self.site in attendance.rejected:
            self.lost_up.forget()
            parcel.slots, parcel.send = {}, [0] * self.transport.sites
        come = self._by_site(attendance.contributors, self.layout.owned)
        inbox = self._inbox()
        received, receive = self._slots(inbox, come)
        self._travel(self._of_others(parcel.buffer), parcel.send, inbox, receive)
        self._count(parcel.slots)
        for chunk, slot in parcel.owned.items():
            sites = attendance.contributors(chunk)
            if sites:
                payloads = (slot if s == self.site else received[s, chunk] for s in sites)
                total, decoded, work = self._work[:, : chunk.num_elements]
                values = (self.codec.decode(payload, decoded) for payload in payloads)
                mean = weighted_mean(values, attendance.weights(sites), total, work)
                if step is not None:
                    step(chunk, mean, work)
                self._encode(chunk, mean, slot, self.lost_down)
        return parcel

    def distribute(self, parcel: Parcel, attendance: Attendance) -> Results:
        """Send what :meth:`reduce` gave to all who hold it.

        What nobody contributed to is not among the results.
        """
        wanted = [chunk for chunk in self.layout.chunks if attendance.contributors(chunk)]
        known = [chunk for chunk in wanted if chunk.owner == self.site]
        outbox, others = self._inbox(), self._of_others(parcel.buffer)
        slots, send = self._slots(outbox, self._by_site(lambda chunk: chunk.receivers, known))
        for chunk in known:
            for site in chunk.receivers:
                if site != self.site:
                    slots[site, chunk].copy_(parcel.owned[chunk])
        received, receive = self._slots(others, self._by_site(lambda c: [c.owner], wanted))
        self._travel(outbox, send, others, receive)
        self._count(slots)
        results = [(chunk, parcel.owned[chunk]) for chunk in known]
        results += [(chunk, slot) for (_, chunk), slot in received.items()]
        return Results(self.codec, results, self._work[0])

    def commit(self) -> None:
        """The meeting has succeeded: what the codec lost in it is for the next one to send."""
        self.lost_up.commit()
        self.lost_down.commit()

    def num_bytes(self) -> int:
        """Of the buffers, and of the memory for what the codec will lose next."""
        spare = self.lost_up.spare_bytes() + self.lost_down.spare_bytes()
        return sum(buffer.nbytes for buffer in self._buffers.values()) + spare

    # ---- one chunk ---------------------------------------------------------------------------

    def _contribute(
        self,
        chunk: Chunk,
        values: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None,
        slot: Tensor,
    ) -> bool:
        """Encode this site's values, or differences; returns whether they are finite."""
        # A codec that loses nothing writes what it gets: that can be put there at once.
        into = self._work[0, : chunk.num_elements]
        into = into if self.codec.is_lossy else self.codec.decode(slot, into)
        if not chunk.is_full:
            into.zero_()
        for part in chunk.parts:
            to = into[part.offset : part.offset + part.stop - part.start]
            value = _elements(part, values)
            if start is None:
                to.copy_(value)
            else:
                torch.sub(_elements(part, start), value, out=to)
        finite = is_finite(into)
        if self.codec.is_lossy:
            self._encode(chunk, into, slot, self.lost_up)
        return finite

    def _encode(self, chunk: Chunk, value: Tensor, slot: Tensor, lost: Carried) -> None:
        """Encode a value, which is overwritten, and what was lost of it before."""
        if not self.codec.is_lossy:
            self.codec.encode(value, slot)
            return
        before, residual = lost.before(chunk), lost.after(chunk)
        if before is not None:
            value.add_(before)
        residual.copy_(value)
        self.codec.encode(value, slot)
        residual.sub_(self.codec.decode(slot, value))

    # ---- who sends what to whom --------------------------------------------------------------

    def _by_site(
        self, sites_of: Callable[[Chunk], Iterable[int]], chunks: Sequence[Chunk]
    ) -> list[list[Chunk]]:
        groups: list[list[Chunk]] = [[] for _ in range(self.transport.sites)]
        for chunk in chunks:
            for site in sites_of(chunk):
                groups[site].append(chunk)
        return groups

    def _num_bytes(self, chunks: Iterable[Chunk]) -> int:
        return sum(self._sizes[chunk] for chunk in chunks)

    def _buffer(self, kind: str, num_bytes: int) -> Tensor:
        if kind not in self._buffers:
            self._buffers[kind] = host_buffer(num_bytes)
        return self._buffers[kind]

    def _inbox(self) -> Tensor:
        """What comes to the owner, and then what it sends back, which is as much or more."""
        copies = (self._sizes[c] * (len(c.receivers) - 1) for c in self.layout.owned)
        return self._buffer("inbox", sum(copies))

    def _of_others(self, buffer: Tensor) -> Tensor:
        """What of a parcel's buffer is for the chunks this site does not own."""
        return buffer[self._owned_bytes :]

    def _slots(
        self, buffer: Tensor, groups: Sequence[Sequence[Chunk]]
    ) -> tuple[dict[tuple[int, Chunk], Tensor], list[int]]:
        """Places for groups of chunks by site, all but this one's, and their bytes by site."""
        sizes = [self._num_bytes(group) for group in groups]
        sizes[self.site] = 0
        keys = [(s, chunk) for s, group in enumerate(groups) if s != self.site for chunk in group]
        parts = self._cut(buffer, [chunk for _, chunk in keys])
        return dict(zip(keys, parts, strict=True)), sizes

    def _cut(self, buffer: Tensor, chunks: Iterable[Chunk]) -> Sequence[Tensor]:
        """The parts of a buffer that chunks take up, one after the other."""
        sizes = [self._sizes[chunk] for chunk in chunks]
        return torch.split(buffer[: sum(sizes)], sizes)

    def _travel(self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]) -> None:
        self.transport.all_to_all(outbox[: sum(send)], send, inbox[: sum(receive)], receive)

    def _count(self, sent: Iterable[tuple[int, Chunk]]) -> None:
        # Of what a site holds alone, nothing is sent, and the ledger says so.
        total = dict.fromkeys((chunk.traffic_class for chunk in self.layout.chunks), 0)
        for _, chunk in sent:
            total[chunk.traffic_class] += self._sizes[chunk]
        for traffic_class, num_bytes in total.items():
            self.ledger.sent(traffic_class, num_bytes)


def _elements(part: Part, values: Mapping[str, Tensor]) -> Tensor:
    """A part of the tensors, given by name, flat."""
    flat = values[part.piece.tensor].reshape(-1)
    return flat if part.stop - part.start == flat.numel() else flat[part.start : part.stop]
