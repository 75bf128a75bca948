# SPDX-License-Identifier: Apache-2.0
"""How tensors are written for the way between sites: as they are, or in fewer bits.

The lossy codecs are deterministic, so that all who decode a payload hold the same bits. What they
lose is for the caller to keep and to send with the next round (error feedback): without, a small
change that is rounded away every time would never arrive. Block sizes and formats are our choice;
FoMoE names compression as future work.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.exchange.pieces import BLOCK

__all__ = ["Codec", "codec_for"]


class Codec(Protocol):
    """Writes flat tensors as bytes.

    ``encode`` gives the payload of a tensor, uint8 (``num_bytes`` of its number of elements,), and
    may return a view; ``decode`` gives the flat tensor of ``num_elements`` that a payload stands
    for, and may return a view of it.
    """

    is_lossy: bool

    def num_bytes(self, num_elements: int) -> int: ...

    def encode(self, value: Tensor) -> Tensor: ...

    def decode(self, payload: Tensor, num_elements: int) -> Tensor: ...


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

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def num_bytes(self, num_elements: int) -> int:
        return num_elements * self.dtype.itemsize

    def encode(self, value: Tensor) -> Tensor:
        return value.view(torch.uint8)

    def decode(self, payload: Tensor, num_elements: int) -> Tensor:
        return payload.view(self.dtype)


class _BFloat16:
    is_lossy = True

    def num_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def encode(self, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor, num_elements: int) -> Tensor:
        return payload.view(torch.bfloat16).float()


class _Integers:
    """Blocks of 128 elements, each a float32 scale and integers of -largest..largest.

    Payload of a tensor: its blocks' scales, then its integers, the last block filled up with
    zeros; those of 4 bits are two to a byte, offset by 8, the first in the lower half.
    """

    is_lossy = True

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.block_bytes = BLOCK if largest > 7 else BLOCK // 2

    def num_bytes(self, num_elements: int) -> int:
        return -(-num_elements // BLOCK) * (4 + self.block_bytes)

    def encode(self, value: Tensor) -> Tensor:
        missing = -value.numel() % BLOCK
        blocks = F.pad(value, (0, missing)).view(-1, BLOCK) if missing else value.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / self.largest
        # A block of zeros, or of numbers so small that their scale is none, becomes zeros.
        divisors = torch.where(scales > 0, scales, torch.ones(()))
        integers = (blocks / divisors[:, None]).round_().clamp_(-self.largest, self.largest)
        packed = self._pack(integers.to(torch.int8))
        return torch.cat([scales.view(torch.uint8), packed.view(-1)])

    def decode(self, payload: Tensor, num_elements: int) -> Tensor:
        blocks = -(-num_elements // BLOCK)
        scales = payload[: 4 * blocks].view(torch.float32)
        packed = payload[4 * blocks :].view(-1, self.block_bytes)
        values = self._unpack(packed).float().mul_(scales[:, None])
        return values.view(-1)[:num_elements]

    def _pack(self, integers: Tensor) -> Tensor:
        """int8 (blocks, 128) -> uint8 (blocks, block_bytes)."""
        if self.largest > 7:
            return integers.view(torch.uint8)
        offset = (integers + 8).view(torch.uint8)
        return offset[:, 0::2] | (offset[:, 1::2] << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        if self.largest > 7:
            return packed.view(torch.int8)
        pairs = torch.stack([packed & 15, packed >> 4], dim=2)
        return pairs.reshape(packed.shape[0], BLOCK).view(torch.int8) - 8
