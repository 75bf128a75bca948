# SPDX-License-Identifier: Apache-2.0
"""Specification of ``fomoe.ops.destinations``. T tokens, K choices, E experts, G groups."""

import torch
from torch import Tensor


def destinations(ids: Tensor, group_of_expert: Tensor, num_groups: int) -> Tensor:
    """To which groups, sites or ranks, a token's row has to go: ascending, each once.

    Parameters
    ----------
    ids : Tensor, (T, K), int32
        Global expert ids; -1 is a slot without an expert.
    group_of_expert : Tensor, (E,), int32
        The group of each expert, -1 if it is in none.
    num_groups : int
        G.

    Returns
    -------
    Tensor, (T, min(K, G)), int32
        The distinct groups of each token, then -1. Not differentiable.

    Raises
    ------
    ValueError
        If an id is outside [-1, E) or a group outside [-1, G).
    """
    for name, values, end in (
        ("ids", ids, group_of_expert.shape[0]),
        ("group_of_expert", group_of_expert, num_groups),
    ):
        outside = values[(values < -1) | (values >= end)]
        if outside.numel() > 0:
            raise ValueError(f"destinations: {name} must be in [-1, {end}), got {int(outside[0])}")
    result = ids.new_full((ids.shape[0], min(ids.shape[1], num_groups)), -1)
    for token, chosen in enumerate(ids.tolist()):
        groups = {int(group_of_expert[expert]) for expert in chosen if expert >= 0} - {-1}
        result[token, : len(groups)] = torch.tensor(sorted(groups), dtype=ids.dtype)
    return result
