# SPDX-License-Identifier: Apache-2.0
"""What a site carries from meeting to meeting: outer momenta, and what a lossy codec lost."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fomoe.federation.exchange.layout import Chunk, Layout
from fomoe.federation.exchange.pieces import Piece
from fomoe.federation.memory import host_buffer

__all__ = ["Carried"]


class Carried:
    """Values of some pieces of a layout.

    New ones are written beside the old and count from :meth:`commit` on, so that a meeting that
    fails leaves everything as it was.

    Parameters
    ----------
    layout : Layout
    pieces : Sequence[Piece]
        Whose values they can be.
    num_elements : int
        So many of the layout, from its beginning, have memory.
    dtype : torch.dtype
    """

    def __init__(
        self, layout: Layout, pieces: Sequence[Piece], num_elements: int, dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self.pieces = pieces
        self.num_elements = num_elements
        self.dtype = dtype
        self._now, self._next = (torch.empty(0, dtype=dtype) for _ in range(2))
        self._known: set[Chunk] = set()
        self._written: set[Chunk] = set()

    def before(self, chunk: Chunk) -> Tensor | None:
        """The values that count, flat; None if there never were any."""
        return _of(self._now, chunk) if chunk in self._known else None

    def after(self, chunk: Chunk) -> Tensor:
        """Where the caller writes the new values, all of them, flat."""
        if self._next.numel() == 0:
            self._next = self._zeros()
        self._written.add(chunk)
        return _of(self._next, chunk)

    def forget(self) -> None:
        """What was written since the last commit does not count."""
        self._written = set()

    def commit(self) -> None:
        """What was written counts from now on."""
        if not self._written:
            return
        for chunk in self._known - self._written:
            _of(self._next, chunk).copy_(_of(self._now, chunk))
        self._now, self._next = self._next, self._now
        self._known, self._written = self._known | self._written, set()

    def by_piece(self) -> dict[str, Tensor]:
        """The values that count, views, flat, by the key of the piece."""
        return {
            piece.key: self._now[start : start + piece.num_elements]
            for piece in self.pieces
            if self.layout.chunks_of[piece.key][0] in self._known
            for start in (self.layout.starts[piece.key],)
        }

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy what :meth:`by_piece` gave, for the pieces that are here.

        Others are zero if they share a chunk with one that is given, and unknown if not.
        """
        given = [piece.key for piece in self.pieces if piece.key in values]
        self._known = {chunk for key in given for chunk in self.layout.chunks_of[key]}
        self._written = set()
        self._now = self._zeros() if given else self._now
        for key in given:
            start = self.layout.starts[key]
            self._now[start : start + values[key].numel()] = values[key]

    def num_bytes(self) -> int:
        """Of the values that count."""
        return self._now.nbytes if self._known else 0

    def spare_bytes(self) -> int:
        """Of the memory beside them, for the next ones."""
        return self._next.nbytes

    def _zeros(self) -> Tensor:
        num_bytes = self.num_elements * self.dtype.itemsize
        return host_buffer(num_bytes).zero_().view(self.dtype)


def _of(values: Tensor, chunk: Chunk) -> Tensor:
    return values[chunk.start : chunk.start + chunk.num_elements]
