# SPDX-License-Identifier: Apache-2.0
"""Where the pieces of a site's tensors lie: end to end by owner, in chunks that fit a cache.

All arithmetic of a meeting is done a chunk at a time, with the same few calls whether it holds a
hundred small tensors or a part of a large one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fomoe.federation.exchange.pieces import Piece

__all__ = ["CHUNK", "Chunk", "Layout", "Part"]

CHUNK = 2**17
"""Most elements of a chunk: several times as many fit a cache. Our choice, by measurement."""


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a piece: ``start`` to ``stop`` of its tensor, from ``offset`` of a chunk on."""

    piece: Piece
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """``num_elements`` from ``start`` of a layout on, encoded and summed at once.

    ``parts`` is what they are; what no part covers is filled up with zeros. The other fields are
    those of :class:`~fomoe.federation.exchange.Piece`, the same for all pieces in it.
    """

    owner: int
    contributors: tuple[int, ...]
    receivers: tuple[int, ...]
    traffic_class: str
    factor: float
    start: int
    num_elements: int
    parts: tuple[Part, ...]

    @property
    def is_full(self) -> bool:
        """Whether the parts cover all of it."""
        return sum(part.stop - part.start for part in self.parts) == self.num_elements


class Layout:
    """The pieces of a site's tensors, first those it owns, then by owner.

    Sites that share a chunk cut it alike. ``chunks`` are in order of their elements, ``owned`` the
    first of them; ``num_elements`` and ``num_owned`` count theirs.

    Parameters
    ----------
    pieces : Sequence[Piece]
        In an order that all sites share for what they share.
    site : int
    alignment : int
        Every piece begins at a multiple of it; :data:`CHUNK` is one.
    """

    def __init__(self, pieces: Sequence[Piece], site: int, alignment: int) -> None:
        self.alignment = alignment
        self.chunks: list[Chunk] = []
        self.starts: dict[str, int] = {}
        """Of pieces, by key, in elements."""
        self.chunks_of: dict[str, list[Chunk]] = {piece.key: [] for piece in pieces}
        """All that a piece is in, by its key."""
        self.num_elements = 0
        order: dict[object, int] = {}
        for piece in pieces:
            order.setdefault(_route(piece), len(order))
        by_owner = sorted(pieces, key=lambda p: (p.owner != site, p.owner, order[_route(p)]))
        for _, group in groupby(by_owner, key=_route):
            self._append(list(group))
        self.owned = [chunk for chunk in self.chunks if chunk.owner == site]
        self.num_owned = sum(chunk.num_elements for chunk in self.owned)

    def _append(self, pieces: Sequence[Piece]) -> None:
        """Lay out pieces that go the same way."""
        parts: list[Part] = []
        filled = 0
        for piece in pieces:
            self.starts[piece.key] = self.num_elements + filled
            start = piece.start
            while start < piece.stop:
                stop = min(piece.stop, start + CHUNK - filled)
                parts.append(Part(piece, start, stop, filled))
                filled += stop - start
                filled += -filled % self.alignment
                start = stop
                if filled == CHUNK:
                    self._close(parts, filled)
                    parts, filled = [], 0
        if parts:
            self._close(parts, filled)

    def _close(self, parts: list[Part], num_elements: int) -> None:
        chunk = Chunk(*_route(parts[0].piece), self.num_elements, num_elements, tuple(parts))
        for part in parts:
            self.chunks_of[part.piece.key].append(chunk)
        self.chunks.append(chunk)
        self.num_elements += num_elements


def _route(piece: Piece) -> tuple[int, tuple[int, ...], tuple[int, ...], str, float]:
    return piece.owner, piece.contributors, piece.receivers, piece.traffic_class, piece.factor
