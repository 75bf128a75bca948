# SPDX-License-Identifier: Apache-2.0
"""What came back from a meeting."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fomoe.federation.exchange.codec import Codec
from fomoe.federation.exchange.pieces import Piece

__all__ = ["Results"]


class Results:
    """Results by tensor name, as they arrived: decoded only when, and where, they are wanted.

    Parameters
    ----------
    codec : Codec
    payloads : Sequence[tuple[Piece, Tensor]]
        All pieces of every tensor there is a result of, encoded.
    """

    def __init__(self, codec: Codec, payloads: Sequence[tuple[Piece, Tensor]]) -> None:
        self.codec = codec
        self._payloads: dict[str, list[tuple[Piece, Tensor]]] = {}
        for piece, payload in payloads:
            self._payloads.setdefault(piece.tensor, []).append((piece, payload))

    def __contains__(self, name: str) -> bool:
        return name in self._payloads

    def __iter__(self) -> Iterator[str]:
        return iter(self._payloads)

    def write(self, name: str, target: Tensor, *, minuend: Tensor | None = None) -> None:
        """Overwrite ``target``, contiguous, on any device, with a result, or ``minuend - result``.

        Both have as many elements as the result.
        """
        flat = target.view(-1)
        for piece, payload in self._payloads[name]:
            value = self.codec.decode(payload, piece.num_elements)
            part = slice(piece.start, piece.stop)
            with torch.no_grad():
                if minuend is None:
                    flat[part].copy_(value)
                elif flat.device == value.device:
                    torch.sub(minuend.view(-1)[part], value, out=flat[part])
                else:
                    flat[part].copy_(minuend.view(-1)[part] - value)
