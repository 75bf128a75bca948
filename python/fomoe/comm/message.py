# SPDX-License-Identifier: Apache-2.0
"""Rows of several tensors as rows of bytes, so that a row travels once and in one message."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowFormat"]

_DENSE = torch.contiguous_format


@dataclass(frozen=True)
class RowFormat:
    """The parts of a row, one after another: dtype and number of elements of each."""

    parts: tuple[tuple[torch.dtype, int], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "RowFormat":
        """Of tensors (N, width) with the same N; every row must have an even number of bytes."""
        return cls(tuple((tensor.dtype, tensor.shape[1]) for tensor in tensors))

    @property
    def num_bytes(self) -> int:
        return sum(dtype.itemsize * width for dtype, width in self.parts)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """(N, num_bytes) uint8."""
        parts = [_bytes_of(tensor) for tensor in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """The parts of (N, num_bytes) uint8; a lone one shares its memory."""
        if len(self.parts) == 1:
            parts = [rows]
        else:
            sizes = [dtype.itemsize * width for dtype, width in self.parts]
            # Copies, even where a part is contiguous: it need not begin at a multiple of its size.
            parts = [part.clone(memory_format=_DENSE) for part in rows.split_with_sizes(sizes, 1)]
        return [
            part.reshape(-1).view(dtype).view(rows.shape[0], width)
            for part, (dtype, width) in zip(parts, self.parts, strict=True)
        ]


def _bytes_of(tensor: Tensor) -> Tensor:
    num_rows, width = tensor.shape
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.view(num_rows, width * tensor.dtype.itemsize)
