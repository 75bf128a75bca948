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

from fomoe.federation.exchange.codec import Codec
from fomoe.federation.exchange.error_feedback import ErrorFeedback
from fomoe.federation.exchange.pieces import Piece
from fomoe.federation.exchange.results import Results
from fomoe.federation.exchange.transport import Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.memory import Scratch, host_buffer

__all__ = ["Attendance", "Exchange", "Parcel", "is_finite", "weighted_mean"]

_REJECTED = -1


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # The extremes are NaN if an element is: one pass, and no temporary.
    return value.numel() == 0 or all(
        math.isfinite(extreme.item()) for extreme in torch.aminmax(value)
    )


def weighted_mean(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w_i x_i) / sum(w_i)`` in the given order; a single value is copied.

    Products and sums are separate roundings and there is one division, so that the result is the
    same on every machine. One value is needed at a time. Source: FoMoE Algorithm 1 (mean over
    holders); weighting by tokens and the order are our choice.
    """
    remaining = iter(values)
    if len(weights) == 1:
        return next(remaining).clone()
    total = next(remaining) * weights[0]
    for value, weight in zip(remaining, weights[1:], strict=True):
        total += value * weight
    return total.div_(sum(weights))


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who takes part in a meeting: tokens by site, None for a site that was rejected."""

    tokens: tuple[int | None, ...]

    @property
    def rejected(self) -> tuple[int, ...]:
        return tuple(site for site, tokens in enumerate(self.tokens) if tokens is None)

    def contributors(self, piece: Piece) -> list[int]:
        """Who sends its value of a piece, ascending; may be nobody."""
        return [site for site in piece.contributors if self.tokens[site] is not None]

    def weights(self, sites: Iterable[int]) -> list[float]:
        return [float(self.tokens[site] or 0) for site in sites]


@dataclass(slots=True)
class Parcel:
    """What a site sends: ``outbox``, ``send[s]`` bytes of which go to site s, and what ``stays``.

    ``is_finite`` says whether all that is in it was finite before it was encoded.
    """

    outbox: Tensor
    send: list[int]
    stays: dict[Piece, Tensor]
    bytes_by_class: dict[str, int]
    is_finite: bool = True

    def empty(self) -> None:
        """Leave nothing to send, and free the memory."""
        self.outbox, self.send = torch.empty(0, dtype=torch.uint8), [0] * len(self.send)
        self.stays, self.bytes_by_class = {}, {}


class Exchange:
    """One site's side of the exchange, for the pieces of the tensors it has.

    All buffers are scratch: a failed exchange leaves the caller's tensors untouched, and what a
    lossy codec loses counts only from :meth:`commit` on.
    """

    def __init__(
        self, pieces: Sequence[Piece], transport: Transport, ledger: SiteLedger, codec: Codec
    ) -> None:
        self.pieces = pieces
        self.transport = transport
        self.ledger = ledger
        self.codec = codec
        self.site = transport.site
        self.owned = [piece for piece in pieces if piece.owner == self.site]
        self.scratch = Scratch()
        """Counts what an exchange allocates, but for the few temporaries of one piece."""
        self.lost_up = ErrorFeedback()
        self.lost_down = ErrorFeedback()

    def attend(self, tokens: int, *, rejected: bool = False) -> Attendance:
        """Tell everyone this site's weight, or that nobody should count its contribution."""
        everyone = self.transport.gather([_REJECTED if rejected else tokens])
        self.ledger.sent("tokens", 8 * (self.transport.sites - 1))
        return Attendance(tuple(None if n == _REJECTED else n for (n,) in everyone))

    def pack(
        self, values: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> Parcel:
        """This site's contributions, encoded: its values by tensor name, which stay as they are.

        With ``start``, by how much the values are less than at the start.
        """

        finite = True

        def content(piece: Piece) -> Tensor:
            nonlocal finite
            value = _part(piece, values)
            if start is not None:
                value = self.scratch.track(_part(piece, start) - value)
            finite = finite and is_finite(value)
            return value

        to = self._by_site(lambda p: [p.owner] if self.site in p.contributors else [])
        parcel = self._pack(to, content, self.lost_up)
        parcel.is_finite = finite
        return parcel

    def reduce(self, parcel: Parcel, attendance: Attendance) -> dict[Piece, Tensor]:
        """Send what :meth:`pack` gave to the owners, if this site counts, and leave it empty.

        Returns the means of the owned pieces, flat; a piece that nobody contributes to is left out.
        """
        if self.site in attendance.rejected:
            self.lost_up.forget()
            parcel.empty()
        payloads = self._travel(parcel, self._by_site(attendance.contributors, self.owned))
        means = {}
        for piece in self.owned:  # in the order in which the results will travel
            sites = attendance.contributors(piece)
            if sites:
                contributions = (
                    self.codec.decode(payloads.pop((site, piece)), piece.num_elements)
                    for site in sites
                )
                mean = weighted_mean(contributions, attendance.weights(sites))
                means[piece] = self.scratch.track(mean)
        return means

    def distribute(self, results: dict[Piece, Tensor], attendance: Attendance) -> Results:
        """Send results, by owned piece, to all who hold them; empties ``results``.

        What nobody contributed to is not among the results.
        """
        wanted = [piece for piece in self.pieces if attendance.contributors(piece)]
        readers = self._by_site(lambda piece: piece.receivers, list(results))
        owners = self._by_site(lambda piece: [piece.owner], wanted)
        payloads = self._travel(self._pack(readers, results.pop, self.lost_down), owners)
        return Results(self.codec, [(piece, payloads[piece.owner, piece]) for piece in wanted])

    def commit(self) -> None:
        """The meeting has succeeded: what the codec lost in it is for the next one to send."""
        self.lost_up.commit()
        self.lost_down.commit()

    def _encode(self, piece: Piece, value: Tensor, feedback: ErrorFeedback) -> Tensor:
        if not self.codec.is_lossy:
            return self.codec.encode(value)
        meant = feedback.corrected(piece.key, value)
        payload = self.scratch.track(self.codec.encode(meant))
        lost = meant - self.codec.decode(payload, piece.num_elements)
        feedback.lost(piece.key, self.scratch.track(lost))
        return payload

    # ---- who sends what to whom --------------------------------------------------------------

    def _by_site(
        self, sites_of: Callable[[Piece], Iterable[int]], pieces: Sequence[Piece] | None = None
    ) -> list[list[Piece]]:
        groups: list[list[Piece]] = [[] for _ in range(self.transport.sites)]
        for piece in self.pieces if pieces is None else pieces:
            for site in sites_of(piece):
                groups[site].append(piece)
        return groups

    def _sizes(self, groups: Sequence[Iterable[Piece]]) -> list[int]:
        """Encoded bytes of the pieces for, or of, every site but this one."""
        sizes = [sum(self.codec.num_bytes(p.num_elements) for p in group) for group in groups]
        sizes[self.site] = 0
        return sizes

    def _pack(
        self,
        to: Sequence[Sequence[Piece]],
        content: Callable[[Piece], Tensor],
        feedback: ErrorFeedback,
    ) -> Parcel:
        """Encode groups of pieces by site, each piece once, however many sites it goes to."""
        send = self._sizes(to)
        outbox = self.scratch.track(host_buffer(sum(send)))
        slots: dict[Piece, list[Tensor]] = {piece: [] for group in to for piece in group}
        for site, (group, part) in enumerate(zip(to, torch.split(outbox, send), strict=True)):
            for piece, slot in self._cut(part, group) if site != self.site else ():
                slots[piece].append(slot)
        parcel = Parcel(outbox, send, {}, {})
        own = set(to[self.site])
        for piece, copies in slots.items():
            payload = self._encode(piece, content(piece), feedback)
            for slot in copies:
                slot.copy_(payload)
            if piece in own:
                parcel.stays[piece] = payload
            crossing = parcel.bytes_by_class.get(piece.traffic_class, 0)
            crossing += len(copies) * payload.numel()
            parcel.bytes_by_class[piece.traffic_class] = crossing
        return parcel

    def _travel(
        self, parcel: Parcel, come: Sequence[Sequence[Piece]]
    ) -> dict[tuple[int, Piece], Tensor]:
        """Send, and receive groups of pieces by site; returns payloads by sender and piece.

        Leaves the parcel empty.
        """
        receive = self._sizes(come)
        inbox = self.scratch.track(self.transport.all_to_all(parcel.outbox, parcel.send, receive))
        for traffic_class, num_bytes in parcel.bytes_by_class.items():
            self.ledger.sent(traffic_class, num_bytes)
        payloads = {(self.site, piece): payload for piece, payload in parcel.stays.items()}
        for site, (group, part) in enumerate(zip(come, torch.split(inbox, receive), strict=True)):
            if site != self.site:
                payloads |= {(site, piece): slot for piece, slot in self._cut(part, group)}
        parcel.empty()
        return payloads

    def _cut(self, buffer: Tensor, group: Sequence[Piece]) -> Iterable[tuple[Piece, Tensor]]:
        """The parts of a buffer that pieces take up, one after the other."""
        sizes = [self.codec.num_bytes(piece.num_elements) for piece in group]
        return zip(group, torch.split(buffer, sizes), strict=True)


def _part(piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
    """A piece of the tensors, given by name, flat."""
    return values[piece.tensor].reshape(-1)[piece.start : piece.stop]
