# SPDX-License-Identifier: Apache-2.0
"""The meeting of the sites: contributions go to the owners, are averaged there, and come back.

Contributions travel to the owners in an uneven all-to-all, are summed there in ascending site id,
and the results come back the same way. A ring all-reduce could not do this: its order of summation
depends on the position in the ring.

Summed over the sites, one exchange sends ``2 (M - 1) b`` bytes for shared tensors of b encoded
bytes, ``2 (holders - 1) b`` for an expert's, and for a row of a full router ``contributors - 1``
times up and ``M - 1`` times down. No site ever receives a tensor of an expert it does not hold.
"""

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
from fomoe.federation.memory import Scratch

__all__ = ["Attendance", "Exchange", "weighted_mean"]

_REJECTED = -1


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

    def contribution(
        self, piece: Piece, values: Mapping[str, Tensor], start: Mapping[str, Tensor] | None
    ) -> Tensor:
        """This site's of a piece, flat: its value, or by how much it is less than at ``start``.

        A view of the value, which is not to be written to, or a new tensor.
        """
        value = _part(piece, values)
        return value if start is None else self.scratch.track(_part(piece, start) - value)

    def reduce(
        self,
        values: Mapping[str, Tensor],
        attendance: Attendance,
        start: Mapping[str, Tensor] | None = None,
    ) -> dict[Piece, Tensor]:
        """Send contributions, made of what the site has by tensor name, to their owners.

        Returns the means of the owned pieces, flat; a piece that nobody contributes to is left out.
        """
        to = self._by_site(
            lambda piece: [piece.owner] if self.site in attendance.contributors(piece) else []
        )
        sources = self._by_site(attendance.contributors, self.owned)
        payloads = self._travel(
            to, sources, lambda piece: self.contribution(piece, values, start), self.lost_up
        )
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
        payloads = self._travel(readers, owners, results.pop, self.lost_down)
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

    def _travel(
        self,
        to: Sequence[Sequence[Piece]],
        come: Sequence[Sequence[Piece]],
        content: Callable[[Piece], Tensor],
        feedback: ErrorFeedback,
    ) -> dict[tuple[int, Piece], Tensor]:
        """Send and receive groups of pieces by site; returns the payloads by sender and piece.

        Every piece is encoded once, however many sites it goes to, and right into the buffer it
        leaves in. What a site sends to itself crosses no link.
        """
        send, receive = self._sizes(to), self._sizes(come)
        outbox = self.scratch.track(torch.empty(sum(send), dtype=torch.uint8))
        slots: dict[Piece, list[Tensor]] = {piece: [] for group in to for piece in group}
        for site, (group, part) in enumerate(zip(to, torch.split(outbox, send), strict=True)):
            for piece, slot in self._cut(part, group) if site != self.site else ():
                slots[piece].append(slot)
        own = set(to[self.site])
        payloads: dict[tuple[int, Piece], Tensor] = {}
        for piece, copies in slots.items():
            payload = self._encode(piece, content(piece), feedback)
            self.ledger.sent(piece.traffic_class, len(copies) * payload.numel())
            for slot in copies:
                slot.copy_(payload)
            if piece in own:
                payloads[self.site, piece] = payload
        inbox = self.scratch.track(self.transport.all_to_all(outbox, send, receive))
        for site, (group, part) in enumerate(zip(come, torch.split(inbox, receive), strict=True)):
            if site != self.site:
                payloads |= {(site, piece): slot for piece, slot in self._cut(part, group)}
        return payloads

    def _cut(self, buffer: Tensor, group: Sequence[Piece]) -> Iterable[tuple[Piece, Tensor]]:
        """The parts of a buffer that pieces take up, one after the other."""
        sizes = [self.codec.num_bytes(piece.num_elements) for piece in group]
        return zip(group, torch.split(buffer, sizes), strict=True)


def _part(piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
    """A piece of the tensors, given by name, flat."""
    return values[piece.tensor].reshape(-1)[piece.start : piece.stop]
