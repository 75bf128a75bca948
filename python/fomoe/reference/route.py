# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.route``. T tokens, K choices, E experts, R = T * K slots."""

import torch
from torch import Tensor

from fomoe.ops.types import Routing


def route(
    ids: Tensor, expert_map: Tensor, num_local_experts: int, *, capacity: int | None = None
) -> Routing:
    """Order the slots by resident expert, then by slot; ghosts and drops get no row.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert.
    expert_map : Tensor, (E,), int32
        Local index of each global expert, -1 if it is not resident here (a ghost).
    num_local_experts : int
        E_local.
    capacity : int, optional
        The most rows of each local expert, which keeps its first slots; the others are drops. None
        is dropless.

    Returns
    -------
    Routing
        The sizes never depend on the ids or the capacity. Not differentiable.

    Raises
    ------
    ValueError
        If an id is outside [-1, E), a map entry is outside [-1, num_local_experts) or the capacity
        is negative.
    """
    if capacity is not None and capacity < 0:
        raise ValueError(f"route: capacity must be at least 0, got {capacity}")
    num_experts = expert_map.shape[0]
    num_slots = ids.numel()
    _check_range("ids", ids, num_experts)
    _check_range("expert_map", expert_map, num_local_experts)
    slot_ids = ids.flatten().long()
    local = torch.where(slot_ids >= 0, expert_map.long()[slot_ids.clamp(min=0)], -1)
    if capacity is not None:
        for expert in range(num_local_experts):
            local[(local == expert).nonzero()[capacity:]] = -1

    # Ghosts and drops sort behind every resident expert; the sort is stable: slots stay in order.
    key = torch.where(local >= 0, local, num_local_experts)
    slots = torch.argsort(key, stable=True)
    group_sizes = torch.bincount(key, minlength=num_local_experts + 1)[:num_local_experts]
    offsets = torch.cat([group_sizes.new_zeros(1), group_sizes.cumsum(0)])

    rows = torch.arange(num_slots, device=ids.device)
    row_to_slot = torch.where(rows < offsets[-1], slots, -1)
    slot_to_row = torch.where(local >= 0, torch.empty_like(rows).scatter(0, slots, rows), -1)
    return Routing(
        slot_to_row.reshape(ids.shape).to(torch.int32),
        row_to_slot.to(torch.int32),
        offsets.to(torch.int32),
    )


def _check_range(argument: str, values: Tensor, end: int) -> None:
    outside = values[(values < -1) | (values >= end)]
    if outside.numel() > 0:
        found = int(outside[0])
        raise ValueError(f"route: {argument} must be in [-1, {end}), got {found}")
