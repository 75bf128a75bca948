# SPDX-License-Identifier: Apache-2.0
"""The meeting of the sites: contributions go to the owners, are averaged there, and come back.

Contributions travel to the owners in an uneven all-to-all, are summed there in ascending site id,
and the results come back the same way. A ring all-reduce could not do this: its order of summation
depends on the position in the ring.

Summed over the sites, one exchange sends ``2 (M - 1) b`` bytes for shared tensors of b encoded
bytes, ``2 (holders - 1) b`` for an expert's, and for a row of a full router ``contributors - 1``
times up and ``M - 1`` times down. No site ever receives a tensor of an expert it does not hold.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomoe.federation.exchange.codec import Codec
from fomoe.federation.exchange.error_feedback import ErrorFeedback
from fomoe.federation.exchange.pieces import Piece
from fomoe.federation.exchange.transport import Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.memory import tensor_bytes

__all__ = ["Attendance", "Exchange", "weighted_mean"]

_REJECTED = -1


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w_i x_i) / sum(w_i)`` in the given order; a single value is copied.

    Products and sums are separate roundings and there is one division, so that the result is the
    same on every machine. Source: FoMoE Algorithm 1 (mean over holders); weighting by tokens and
    the order are our choice.
    """
    if len(values) == 1:
        return values[0].clone()
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total / sum(weights)


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
        self.peak_scratch_bytes = 0
        self.borrowed: Sequence[Tensor] = ()
        """The caller's lasting tensors, which contributions may be views of: no scratch."""
        self.lost_up = ErrorFeedback()
        self.lost_down = ErrorFeedback()

    def attend(self, tokens: int, *, rejected: bool = False) -> Attendance:
        """Tell everyone this site's weight, or that nobody should count its contribution."""
        everyone = self.transport.gather([_REJECTED if rejected else tokens])
        self.ledger.sent("tokens", 8 * (self.transport.sites - 1))
        return Attendance(tuple(None if n == _REJECTED else n for (n,) in everyone))

    def reduce(
        self, contributions: Mapping[str, Tensor], attendance: Attendance
    ) -> dict[Piece, Tensor]:
        """Send contributions, by tensor name, to their owners.

        Returns the means of the owned pieces, flat; a piece that nobody contributes to is left out.
        """
        to = self._by_site(
            lambda piece: [piece.owner] if self.site in attendance.contributors(piece) else []
        )
        pieces = [piece for group in to for piece in group]
        flat = {name: value.reshape(-1) for name, value in contributions.items()}
        values = [flat[piece.tensor][piece.start : piece.stop] for piece in pieces]
        encoded = self._encode(pieces, values, self.lost_up)
        outbox = _joined(chunk for chunks in encoded for chunk in chunks)
        sources = self._by_site(attendance.contributors, self.owned)
        received: dict[Piece, list[Tensor]] = {}
        for piece, value in self._travel(outbox, to, sources, keep=contributions.values()):
            received.setdefault(piece, []).append(value)
        return {
            piece: weighted_mean(
                received[piece], attendance.weights(attendance.contributors(piece))
            )
            for piece in self.owned  # in the order in which the results will travel
            if piece in received
        }

    def distribute(
        self, results: Mapping[Piece, Tensor], attendance: Attendance
    ) -> dict[str, Tensor]:
        """Send results, by owned piece, to all who hold them.

        Returns flat tensors by name; one that nobody contributed to is left out.
        """
        wanted = [piece for piece in self.pieces if attendance.contributors(piece)]
        readers = self._by_site(lambda piece: piece.receivers, list(results))
        owners = self._by_site(lambda piece: [piece.owner], wanted)
        # Once per piece, however many sites it goes to.
        chunks = self._encode(list(results), list(results.values()), self.lost_down)
        encoded = dict(zip(results, chunks, strict=True))
        outbox = _joined(chunk for group in readers for piece in group for chunk in encoded[piece])
        received = dict(self._travel(outbox, readers, owners, keep=results.values()))
        parts: dict[str, list[Tensor]] = {}
        for piece in wanted:
            parts.setdefault(piece.tensor, []).append(received[piece])
        return {
            name: values[0] if len(values) == 1 else torch.cat(values)
            for name, values in parts.items()
        }

    def commit(self) -> None:
        """The meeting has succeeded: what the codec lost in it is for the next one to send."""
        self.lost_up.commit()
        self.lost_down.commit()

    def _encode(
        self, pieces: Sequence[Piece], values: Sequence[Tensor], feedback: ErrorFeedback
    ) -> list[tuple[Tensor, ...]]:
        if not self.codec.is_lossy:
            return self.codec.encode(values)
        meant = [feedback.corrected(p.key, x) for p, x in zip(pieces, values, strict=True)]
        encoded = self.codec.encode(meant)
        payload = _joined(chunk for chunks in encoded for chunk in chunks)
        decoded = self.codec.decode(payload, [value.numel() for value in meant])
        for piece, value, arriving in zip(pieces, meant, decoded, strict=True):
            feedback.lost(piece.key, value - arriving)
        return encoded

    # ---- who sends what to whom --------------------------------------------------------------

    def _by_site(
        self, sites_of: Callable[[Piece], Iterable[int]], pieces: Sequence[Piece] | None = None
    ) -> list[list[Piece]]:
        groups: list[list[Piece]] = [[] for _ in range(self.transport.sites)]
        for piece in self.pieces if pieces is None else pieces:
            for site in sites_of(piece):
                groups[site].append(piece)
        return groups

    def _num_bytes(self, group: Iterable[Piece]) -> int:
        return sum(self.codec.num_bytes(piece.num_elements) for piece in group)

    def _travel(
        self,
        outbox: Tensor,
        to: Sequence[Sequence[Piece]],
        come: Sequence[Sequence[Piece]],
        *,
        keep: Iterable[Tensor],
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Send and receive groups of pieces by site; ``keep`` is what else is alive now."""
        send, receive = [[self._num_bytes(group) for group in groups] for groups in (to, come)]
        inbox = self.transport.all_to_all(outbox, send, receive)
        for site, group in enumerate(to):
            for piece in group:  # what a site sends to itself crosses no link
                crossing = self.codec.num_bytes(piece.num_elements) if site != self.site else 0
                self.ledger.sent(piece.traffic_class, crossing)
        scratch = tensor_bytes([inbox, outbox, *keep], besides=self.borrowed)
        self.peak_scratch_bytes = max(self.peak_scratch_bytes, scratch)
        for group, payload in zip(come, torch.split(inbox, receive), strict=True):
            values = self.codec.decode(payload, [piece.num_elements for piece in group])
            yield from zip(group, values, strict=True)


def _joined(chunks: Iterable[Tensor]) -> Tensor:
    parts = list(chunks)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
