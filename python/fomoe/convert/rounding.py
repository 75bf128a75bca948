# SPDX-License-Identifier: Apache-2.0
"""From scores to an assignment in which every expert has exactly its number of neurons.

H neurons, E experts.
"""

import math

import torch
from torch import Tensor

from fomoe.convert.sinkhorn import require_capacity


def greedy_rounding(scores_HE: Tensor, capacity: int) -> Tensor:
    """Visit scores from the highest down; assign if the neuron is free and the expert not full.

    Among equal scores, the lower neuron and then the lower expert comes first. Source: DOT-MoE
    (arXiv 2606.01666). Not by visiting: as both sides rank a pair by the same score, the greedy
    assignment is the only stable matching, which neurons that propose and experts that keep the
    best find in a few dense passes.

    Parameters
    ----------
    scores_HE : Tensor, (H, E), any float dtype
    capacity : int
        Neurons of one expert, H / E.

    Returns
    -------
    Tensor, (H,), int64
        The expert of each neuron; each expert has ``capacity``.

    Raises
    ------
    ValueError
        If E times ``capacity`` is not H, or a score is not finite.
    """
    require_capacity("greedy_rounding", scores_HE, capacity)
    if not bool(scores_HE.isfinite().all()):
        raise ValueError("greedy_rounding: expected finite scores, got inf or nan")
    open_HE = scores_HE.clone()
    num_experts = open_HE.shape[1]
    every_expert = torch.arange(num_experts, device=open_HE.device)
    while True:
        best_H, expert_H = open_HE.max(1)
        by_score = best_H.argsort(descending=True, stable=True)
        order = by_score[expert_H[by_score].argsort(stable=True)]
        sorted_experts = expert_H[order]
        begin_E = torch.searchsorted(sorted_experts, every_expert)
        rank = torch.arange(len(order), device=order.device) - begin_E[sorted_experts]
        refused = order[rank >= capacity]
        if not len(refused):
            return expert_H
        open_HE[refused, expert_H[refused]] = -math.inf
        # What is below the last place of a full expert would be refused in a later pass, too.
        last = order[rank == capacity - 1]
        floor_E = open_HE.new_full((num_experts,), -math.inf)
        floor_E[expert_H[last]] = best_H[last]
        open_HE.masked_fill_(open_HE < floor_E, -math.inf)
