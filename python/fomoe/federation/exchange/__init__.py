# SPDX-License-Identifier: Apache-2.0
"""How the sites' tensors meet: to their owners, mean, and back to all who hold them."""

from fomoe.federation.exchange.carried import Carried
from fomoe.federation.exchange.codec import Codec, codec_for
from fomoe.federation.exchange.exchange import (
    Attendance,
    Exchange,
    Parcel,
    is_finite,
    weighted_mean,
)
from fomoe.federation.exchange.layout import Chunk, Layout
from fomoe.federation.exchange.pieces import BLOCK, Piece, cut
from fomoe.federation.exchange.results import Results
from fomoe.federation.exchange.transport import Bystander, GroupTransport, Transport

__all__ = [
    "BLOCK",
    "Attendance",
    "Bystander",
    "Carried",
    "Chunk",
    "Codec",
    "Exchange",
    "GroupTransport",
    "Layout",
    "Parcel",
    "Piece",
    "Results",
    "Transport",
    "codec_for",
    "cut",
    "is_finite",
    "weighted_mean",
]
