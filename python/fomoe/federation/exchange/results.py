# SPDX-License-Identifier: Apache-2.0
"""What came back from a meeting."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fomoe.federation.exchange.codec import Codec
from fomoe.federation.exchange.layout import Chunk, Part

__all__ = ["Results"]


class Results:
    """Results by tensor name, as they arrived: decoded only when, and where, they are wanted.

    They are views of the exchange's buffers, and live until its next meeting.

    Parameters
    ----------
    codec : Codec
    payloads : Sequence[tuple[Chunk, Tensor]]
        All chunks of every tensor there is a result of, encoded.
    work : Tensor
        Memory for the elements of any of the chunks, of the codec's dtype.
    """

    def __init__(
        self, codec: Codec, payloads: Sequence[tuple[Chunk, Tensor]], work: Tensor
    ) -> None:
        self.codec = codec
        self._work = work
        self._parts: dict[str, list[tuple[Part, Tensor]]] = {}
        for chunk, payload in payloads:
            for part in chunk.parts:
                self._parts.setdefault(part.piece.tensor, []).append((part, payload))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def write(self, name: str, target: Tensor, *, minuend: Tensor | None = None) -> None:
        """Overwrite ``target``, contiguous, on any device, with a result, or ``minuend - result``.

        Both have as many elements as the result.
        """
        flat = target.view(-1)
        before = None if minuend is None else minuend.view(-1)
        for part, payload in self._parts[name]:
            size = part.stop - part.start
            aligned = size + -size % self.codec.alignment
            value = self.codec.decode(payload, self._work[:aligned], part.offset)[:size]
            to = flat[part.start : part.stop]
            if before is None:
                to.copy_(value)
            elif to.device == value.device:
                torch.sub(before[part.start : part.stop], value, out=to)
            else:
                to.copy_(before[part.start : part.stop] - value)
