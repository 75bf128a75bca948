# SPDX-License-Identifier: Apache-2.0
"""destinations: the distinct groups that own a token's experts."""

import torch
from torch import Tensor

from fomoe.ops._checks import INT32, check, check_devices, check_tensor


def destinations(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    """List for every token the groups that own its experts, each once, ascending.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert. Any strides.
    group_of_expert : Tensor, (E,), int32
        The group (a rank, a site) that owns each expert, -1 if none does.
    num_groups : int
        G, at least 0.

    Returns
    -------
    Tensor, (T, min(K, G)), int32
        Padded with -1. The size never depends on the ids. ``route`` with the identity as its map
        orders it by group. Not differentiable. Deterministic.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, T*K is beyond int32, an id is outside [-1, E), a group
        outside [-1, G) or ``num_groups`` negative; the message names the value and where it stands.
    """
    groups: Tensor = torch.ops.fomoe.destinations(ids, group_of_expert, num_groups)
    return groups


@torch.library.register_fake("fomoe::destinations")
def _fake(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    check_devices("destinations", {"ids": ids, "group_of_expert": group_of_expert})
    check_tensor("destinations", "ids", ids, INT32, (None, None), "(T, K)")
    check_tensor("destinations", "group_of_expert", group_of_expert, INT32, (None,), "(E,)")
    check(
        num_groups >= 0,
        lambda: f"fomoe::destinations: num_groups must be at least 0, got {num_groups}",
    )
    num_tokens, top_k = ids.shape
    return ids.new_empty(num_tokens, min(top_k, num_groups))
