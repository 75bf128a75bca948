# SPDX-License-Identifier: Apache-2.0
"""Rows by group in slots of one fixed size, so that no size depends on data."""

import torch
from torch import Tensor

from fomoe.ops import Routing

__all__ = ["pad", "unpad"]


def pad(rows: Tensor, routing: Routing, groups: Tensor, capacity: int, filler: Tensor) -> Tensor:
    """The rows of each group, and then the filler until there are ``capacity`` of them.

    Parameters
    ----------
    rows : Tensor, (R, width)
        In the order of the routing, no group with more than ``capacity``.
    groups : Tensor, (n,), int64
        Which groups of the routing's, ascending; on the device of rows.
    filler : Tensor, (width,)

    Returns
    -------
    Tensor, (n * capacity, width)
    """
    begin, end = _bounds(routing, groups)
    place = begin[:, None] + torch.arange(capacity, device=rows.device)
    is_row = (place < end[:, None]).flatten()
    if rows.shape[0] == 0:
        return filler.expand(is_row.shape[0], -1).contiguous()
    padded = rows.index_select(0, place.flatten().clamp(max=rows.shape[0] - 1))
    return torch.where(is_row[:, None], padded, filler)


def unpad(padded: Tensor, routing: Routing, groups: Tensor, capacity: int) -> Tensor:
    """The rows in the order of the routing again, (R, width); beyond its last one, anything."""
    num_rows = routing.row_to_slot.shape[0]
    begin, end = _bounds(routing, groups)
    row = torch.arange(num_rows, device=padded.device)
    if padded.shape[0] == 0:
        return padded.new_zeros(num_rows, padded.shape[1])
    group = torch.searchsorted(end, row, right=True).clamp(max=groups.shape[0] - 1)
    place = group * capacity + row - begin[group]
    return padded.index_select(0, place.clamp(0, padded.shape[0] - 1))


def _bounds(routing: Routing, groups: Tensor) -> tuple[Tensor, Tensor]:
    """First row of every group, and the first one after it."""
    offsets = routing.offsets.to(torch.int64)
    return offsets[groups], offsets[groups + 1]
