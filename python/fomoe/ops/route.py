# SPDX-License-Identifier: Apache-2.0
"""route: give every slot whose expert is resident a row, grouped by expert."""

import torch
from torch import Tensor

from fomoe.ops._checks import INT32, check, check_devices, check_tensor
from fomoe.ops.types import Routing


def route(ids: Tensor, expert_map: Tensor, num_local_experts: int) -> Routing:
    """Order the slots by resident expert, then by slot; ghosts get no row.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert. Any strides.
    expert_map : Tensor, (E,), int32
        Local index of each global expert, -1 if it is not resident here (a ghost).
    num_local_experts : int
        E_local; 0 for a site without experts of this layer.

    Returns
    -------
    Routing
        slot_to_row (T, K), row_to_slot (T*K,) and offsets (E_local + 1,), all int32. The sizes
        never depend on the ids. Not differentiable. Deterministic.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, T*K is beyond int32, an id is outside [-1, E) or a map
        entry outside [-1, E_local); the message names the value and where it stands.
    """
    return Routing(*torch.ops.fomoe.route(ids, expert_map, num_local_experts))


@torch.library.register_fake("fomoe::route")
def _fake(ids: Tensor, expert_map: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("route", {"ids": ids, "expert_map": expert_map})
    check_tensor("route", "ids", ids, INT32, (None, None), "(T, K)")
    check_tensor("route", "expert_map", expert_map, INT32, (None,), "(E,)")
    check(
        num_local_experts >= 0,
        lambda: f"fomoe::route: num_local_experts must be at least 0, got {num_local_experts}",
    )
    num_tokens, top_k = ids.shape
    return (
        ids.new_empty(num_tokens, top_k),
        ids.new_empty(num_tokens * top_k),
        ids.new_empty(num_local_experts + 1),
    )
