# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.destinations``. T tokens, K choices, E experts, G groups."""

import torch
from torch import Tensor


def destinations(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    """List for every token the groups that own its experts, each once, ascending.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert.
    group_of_expert : Tensor, (E,), int32
        The group (a rank, a site) that owns each expert, -1 if none does.
    num_groups : int
        G, at least 0.

    Returns
    -------
    Tensor, (T, min(K, G)), int32
        Padded with -1. The size never depends on the ids. Not differentiable.

    Raises
    ------
    ValueError
        If an id is outside [-1, E), a group outside [-1, G) or ``num_groups`` negative.
    """
    if num_groups < 0:
        raise ValueError(f"destinations: num_groups must be at least 0, got {num_groups}")
    _check_range("ids", ids, group_of_expert.shape[0])
    _check_range("group_of_expert", group_of_expert, num_groups)
    rows = []
    for experts in ids.tolist():
        groups = {int(group_of_expert[expert]) for expert in experts if expert >= 0} - {-1}
        rows.append(sorted(groups) + [-1] * (min(ids.shape[1], num_groups) - len(groups)))
    shape = ids.shape[0], min(ids.shape[1], num_groups)
    return torch.tensor(rows, dtype=torch.int32, device=ids.device).reshape(shape)


def _check_range(argument: str, values: Tensor, end: int) -> None:
    outside = values[(values < -1) | (values >= end)]
    if outside.numel() > 0:
        found = int(outside[0])
        raise ValueError(f"destinations: {argument} must be in [-1, {end}), got {found}")
