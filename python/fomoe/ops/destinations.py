# SPDX-License-Identifier: Apache-2.0
"""destinations: the groups to which a token's experts belong, each once."""

import torch
from torch import Tensor

from fomoe.ops._checks import INT32, check, check_devices, check_tensor


def destinations(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    """To which groups, sites or ranks, a token's row has to go: ascending, each once.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert. Any strides.
    group_of_expert : Tensor, (E,), int32
        The group of each expert, -1 if it is in none.
    num_groups : int
        G, at least 0.

    Returns
    -------
    Tensor, (T, min(K, G)), int32
        The distinct groups of each token, then -1. Ids for :func:`fomoe.ops.route`, which makes
        them the order to pack rows in. Not differentiable. Deterministic.

    Raises
    ------
    RuntimeError
        When a shape or dtype does not fit, an id is outside [-1, E) or a group outside [-1, G); the
        message names the value and where it stands.
    """
    result: Tensor = torch.ops.fomoe.destinations(ids, group_of_expert, num_groups)
    return result


@torch.library.register_fake("fomoe::destinations")
def _fake(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    check_devices("destinations", {"ids": ids, "group_of_expert": group_of_expert})
    check_tensor("destinations", "ids", ids, INT32, (None, None), "(T, K)")
    check_tensor("destinations", "group_of_expert", group_of_expert, INT32, (None,), "(E,)")
    check(
        num_groups >= 0,
        lambda: f"fomoe::destinations: num_groups must be at least 0, got {num_groups}",
    )
    return ids.new_empty(ids.shape[0], min(ids.shape[1], num_groups))
