# SPDX-License-Identifier: Apache-2.0
"""route: give every slot whose expert is resident a row, grouped by expert."""

import torch
from torch import Tensor

from fomoe.ops._checks import INT32, check, check_devices, check_tensor
from fomoe.ops.types import Routing


def route(
    ids: Tensor, expert_map: Tensor, num_local_experts: int, *, capacity: int | None = None
) -> Routing:
    """Order the slots by resident expert, then by slot; ghosts and drops get no row.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert. Any strides.
    expert_map : Tensor, (E,), int32
        Local index of each global expert, -1 if it is not resident here (a ghost).
    num_local_experts : int
        E_local; 0 for a site without experts of this layer.
    capacity : int, optional
        The most rows of each local expert, at least 0. An expert keeps its first slots, those of
        the earliest tokens; the others are drops, which are skipped as ghosts are (as in GShard,
        arXiv 2006.16668, algorithm 1). None is dropless. May be a SymInt: a capacity computed from
        T does not make torch.compile(dynamic=True) compile again.

    Returns
    -------
    Routing
        slot_to_row (T, K), row_to_slot (T*K,) and offsets (E_local + 1,), all int32. The sizes
        never depend on the ids or the capacity. Not differentiable. Deterministic.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, T*K is beyond int32, an id is outside [-1, E), a map
        entry outside [-1, E_local) or the capacity negative; the message names the value and where
        it stands.
    """
    return Routing(*torch.ops.fomoe.route(ids, expert_map, num_local_experts, capacity))


@torch.library.register_fake("fomoe::route")
def _fake(
    ids: Tensor, expert_map: Tensor, num_local_experts: int, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("route", {"ids": ids, "expert_map": expert_map})
    check_tensor("route", "ids", ids, INT32, (None, None), "(T, K)")
    check_tensor("route", "expert_map", expert_map, INT32, (None,), "(E,)")
    check(
        num_local_experts >= 0,
        lambda: f"fomoe::route: num_local_experts must be at least 0, got {num_local_experts}",
    )
    if capacity is not None:
        check(
            capacity >= 0,
            lambda: f"fomoe::route: capacity must be at least 0, got {capacity}",
        )
    num_tokens, top_k = ids.shape
    return (
        ids.new_empty(num_tokens, top_k),
        ids.new_empty(num_tokens * top_k),
        ids.new_empty(num_local_experts + 1),
    )
