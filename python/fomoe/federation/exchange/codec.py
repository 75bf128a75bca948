# SPDX-License-Identifier: Apache-2.0
"""How tensors are written for the way between sites: as they are, or in fewer bits.

The lossy codecs are deterministic, so that all who decode a payload hold the same bits. What they
lose is for the caller to keep and to send with the next round (error feedback): without, a small
change that is rounded away every time would never arrive. Block sizes and formats are our choice;
FoMoE names compression as future work.
"""

from typing import Protocol

import torch
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.exchange.pieces import BLOCK

__all__ = ["Codec", "codec_for"]


class Codec(Protocol):
    """Writes flat tensors of ``dtype`` as bytes; a tensor's payload has ``num_bytes`` of its size.

    What begins at a multiple of ``alignment`` elements can be decoded by itself.
    """

    is_lossy: bool
    dtype: torch.dtype
    alignment: int

    def num_bytes(self, num_elements: int) -> int: ...

    def encode(self, value: Tensor, payload: Tensor) -> None:
        """Write a tensor (n,), which is overwritten, to ``payload``, uint8 (num_bytes(n),).

        n is a multiple of ``alignment``.
        """
        ...

    def decode(self, payload: Tensor, into: Tensor, start: int = 0) -> Tensor:
        """The elements from ``start`` on, as many as ``into`` has.

        In ``into``, or a view of the payload. Both numbers are multiples of ``alignment``.
        """
        ...


def codec_for(name: str, dtype: torch.dtype) -> Codec:
    """The codec of ``federation.codec`` for parameters of ``dtype``.

    Raises
    ------
    UserError
        A lossy codec is asked for, but the parameters are not float32.
    """
    if name == "fp32":
        return _Raw(dtype)
    if dtype != torch.float32:
        raise UserError(
            f"federation.codec = {name!r} encodes float32 parameters, but the model's are "
            f"{str(dtype).removeprefix('torch.')}"
        )
    codecs: dict[str, Codec] = {
        "bf16": _BFloat16(),
        "int8": _Integers(127),
        "int4": _Integers(7),
    }
    return codecs[name]


class _Raw:
    is_lossy = False
    alignment = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def num_bytes(self, num_elements: int) -> int:
        return num_elements * self.dtype.itemsize

    def encode(self, value: Tensor, payload: Tensor) -> None:
        payload.view(self.dtype).copy_(value)

    def decode(self, payload: Tensor, into: Tensor, start: int = 0) -> Tensor:
        return payload.view(self.dtype)[start : start + into.numel()]


class _BFloat16:
    is_lossy = True
    alignment = 1
    dtype = torch.float32

    def num_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def encode(self, value: Tensor, payload: Tensor) -> None:
        payload.view(torch.bfloat16).copy_(value)

    def decode(self, payload: Tensor, into: Tensor, start: int = 0) -> Tensor:
        return into.copy_(payload.view(torch.bfloat16)[start : start + into.numel()])


class _Integers:
    """Blocks of 128 elements, each a float32 scale and integers of -largest..largest.

    Payload of a tensor: its blocks' scales, then its integers; those of 4 bits are two to a byte,
    offset by 8, the first in the lower half.
    """

    is_lossy = True
    alignment = BLOCK
    dtype = torch.float32

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.block_bytes = BLOCK if largest > 7 else BLOCK // 2

    def num_bytes(self, num_elements: int) -> int:
        return -(-num_elements // BLOCK) * (4 + self.block_bytes)

    def encode(self, value: Tensor, payload: Tensor) -> None:
        blocks = value.view(-1, BLOCK)
        scales, packed = self._parts(payload, 0, blocks.shape[0])
        torch.amax(blocks.abs(), dim=1, out=scales)
        scales /= self.largest
        # A block of zeros, or of numbers so small that their scale is none, becomes zeros.
        divisors = torch.where(scales > 0, scales, 1.0)
        blocks.div_(divisors[:, None]).round_().clamp_(-self.largest, self.largest)
        if self.largest > 7:
            packed.view(torch.int8).copy_(value)
        else:
            # Two bytes as one number, first in the lower half: the second's bits move next to it.
            pairs = value.to(torch.int8).add_(8).view(torch.int16)
            packed.copy_(pairs | (pairs >> 4))

    def decode(self, payload: Tensor, into: Tensor, start: int = 0) -> Tensor:
        blocks = into.view(-1, BLOCK)
        scales, packed = self._parts(payload, start // BLOCK, blocks.shape[0])
        if self.largest > 7:
            into.copy_(packed.view(torch.int8))
        else:
            pairs = packed.to(torch.int16)
            into.copy_(
                ((pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F)).view(torch.int8).sub_(8)
            )
        blocks.mul_(scales[:, None])
        return into

    def _parts(self, payload: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Scales, float32 (count,), and integers, uint8, of ``count`` blocks from the first on."""
        begin = 4 * (payload.numel() // (4 + self.block_bytes)) + first * self.block_bytes
        scales = payload[4 * first : 4 * (first + count)].view(torch.float32)
        return scales, payload[begin : begin + count * self.block_bytes]
