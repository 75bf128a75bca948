# SPDX-License-Identifier: Apache-2.0
"""What a site takes from a checkpoint beside the model: moments, momenta, what codecs lost.

Where nothing has changed, a site finds all of it in its own file. With another number of sites or
another placement it looks through everybody's: momenta belong to tensors, whoever owned them, and
AdamW's state of a tensor is as good from another holder. What a codec lost is then dropped.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe.federation.checkpoint import Checkpoint
from fomoe.federation.exchange import Piece
from fomoe.federation.meeting import OUTER_MOMENTUM, Meetings
from fomoe.federation.placement import Placement
from fomoe.nn import ModelTensor

__all__ = ["saved_state"]

_PIECE = re.compile(rf"{OUTER_MOMENTUM}/(?P<tensor>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def saved_state(
    checkpoint: Checkpoint,
    site: int,
    placement: Placement,
    tensors: Sequence[ModelTensor],
    meetings: Meetings,
) -> dict[str, Tensor]:
    """The entries of a checkpoint's state, by name, that are a site's now."""
    if checkpoint.placement == placement:
        return checkpoint.state(site)
    names = {donor: checkpoint.state_names(donor) for donor in range(checkpoint.sites)}
    # Its own file first: data of a site with the same number is most like its own.
    donors = sorted(names, key=lambda donor: donor != site % checkpoint.sites)
    missing = {tensor.name for tensor in tensors}
    state: dict[str, Tensor] = {}
    for donor in donors:
        # All of a tensor's entries from one donor: its steps belong to its moments.
        entries = {name for name in names[donor] if _tensor_of(name) in missing}
        missing -= set(map(_tensor_of, entries))
        state |= checkpoint.state(donor, entries)
    saved = _saved_momenta(names)
    for piece in meetings.exchange.owned:
        momentum = _momentum(checkpoint, saved.get(piece.tensor, []), piece)
        if momentum is not None:
            state[f"{OUTER_MOMENTUM}/{piece.key}"] = momentum
    return state


def _tensor_of(name: str) -> str:
    return name.partition("/")[2]


class _SavedPiece(NamedTuple):
    donor: int
    name: str
    start: int
    stop: int


def _saved_momenta(names: Mapping[int, set[str]]) -> dict[str, list[_SavedPiece]]:
    """The pieces of momentum in the files of all sites, by tensor name."""
    saved: dict[str, list[_SavedPiece]] = {}
    for donor, donated in names.items():
        for name in donated:
            if match := _PIECE.fullmatch(name):
                piece = _SavedPiece(donor, name, int(match["start"]), int(match["stop"]))
                saved.setdefault(match["tensor"], []).append(piece)
    return saved


def _momentum(checkpoint: Checkpoint, saved: Sequence[_SavedPiece], piece: Piece) -> Tensor | None:
    """Put together from the pieces that others owned; None when there is none of it."""
    found: Tensor | None = None
    for donor, name, start, stop in saved:
        begin, end = max(start, piece.start), min(stop, piece.stop)
        if begin < end:
            value = checkpoint.state(donor, {name})[name]
            if found is None:
                found = torch.zeros(piece.num_elements, dtype=value.dtype)
            found[begin - piece.start : end - piece.start] = value[begin - start : end - start]
    return found
