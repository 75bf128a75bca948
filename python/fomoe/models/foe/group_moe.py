# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer of a Federation of Experts: every token has experts in every group.

G groups held here of H, T tokens, D model width, E experts, K experts per token in a group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fomoe.comm import ExpertExchange
from fomoe.models.foe.config import FoEConfig
from fomoe.nn import RoutedLayer
from fomoe.nn.experts import wide_linear
from fomoe.ops import GateOutput, route, topk_gate

__all__ = ["GroupMoE"]


class GroupMoE(RoutedLayer):
    """For each group y_h = sum over the K chosen and resident experts of it of weight * expert(x).

    One router scores all E experts; the best K of every group are chosen. Parameters, dtypes and
    ghosts are as in :class:`fomoe.MoE`. Source: FoE (arXiv 2605.06206), which leaves open what the
    softmax is over, whether weights are normalised, and the losses.

    Parameters
    ----------
    config : FoEConfig
    groups : range
        The groups that are held here.
    resident_experts : Sequence[int], optional
        Ascending global ids of the experts held here; by default those of the groups.
    exchange : ExpertExchange, optional
        Among the ranks of a single group, which have its experts together.

    Raises
    ------
    ValueError
        As :class:`fomoe.MoE`.
    """

    def __init__(
        self,
        config: FoEConfig,
        groups: range,
        resident_experts: Sequence[int] | None = None,
        exchange: ExpertExchange | None = None,
    ) -> None:
        size = config.experts_per_group
        here = [group * size + i for group in groups for i in range(size)]
        if exchange is None and resident_experts is None:
            resident_experts = here
        super().__init__(config.moe(), resident_experts, exchange)
        self.candidates = here
        self.num_groups = config.num_groups
        self.groups = groups
        self.softmax_over = config.softmax_over

    def forward(self, x: Tensor) -> Tensor:
        """Apply every group's experts to every vector of x.

        Parameters
        ----------
        x : Tensor, (..., D), float64 | float32 | bfloat16 | float16
            Of the weights' dtype, unless autocast is on.

        Returns
        -------
        Tensor, (G, ..., D), dtype of x, or the autocast dtype
        """
        num_here = len(self.groups)
        x_TD = x.reshape(math.prod(x.shape[:-1]), self.config.dim)
        gate = self._choose(x_TD)
        if self.exchange is None:
            # Every group's choice as tokens of their own, for the sums must stay apart.
            x_GTD = x_TD.expand(num_here, *x_TD.shape).reshape(-1, self.config.dim)
            routing = route(gate.ids, self.expert_map, self.experts.num_experts)
            y: Tensor = self.experts(x_GTD, gate.weights, routing)
        else:
            y = self._exchanged(self.exchange, x_TD, gate)
        self._observe(gate, (gate.counts * self.reachable).sum())
        return y.reshape(num_here, *x.shape)

    def _choose(self, x_TD: Tensor) -> GateOutput:
        """Of the groups here: ids and weights (G*T, K), counts (E,), prob_sum and z_sum (G, ...)"""
        config = self.config
        logits_TE = wide_linear(x_TD, self.router)
        by_group = logits_TE.chunk(self.num_groups, dim=1)
        # Weights that add up over all groups take the choice in all of them.
        groups = range(self.num_groups) if config.renormalize else self.groups
        top_k = config.top_k // self.num_groups
        gates = [topk_gate(by_group[group], top_k, score=config.score) for group in groups]
        weights_GTK = torch.stack([gate.weights for gate in gates])
        if config.score == "softmax" and self.softmax_over == "all":
            mass_HT = torch.stack([part.logsumexp(dim=1) for part in by_group]).softmax(dim=0)
            weights_GTK = weights_GTK * mass_HT[groups.start : groups.stop, :, None]
        here = slice(self.groups.start, self.groups.stop)
        if config.renormalize:
            weights_GTK = (weights_GTK / weights_GTK.sum(dim=(0, 2))[:, None])[here]
            gates = gates[here]
        size = config.num_experts // self.num_groups
        counts_HE = gates[0].counts.new_zeros(self.num_groups, size)
        counts_HE[here] = torch.stack([gate.counts for gate in gates])
        return GateOutput(
            ids=torch.cat([g.ids + size * i for i, g in zip(self.groups, gates, strict=True)]),
            weights=weights_GTK.flatten(0, 1) * config.scale,
            counts=counts_HE.flatten(),
            prob_sum=torch.stack([gate.prob_sum for gate in gates]),
            z_sum=torch.stack([gate.z_sum for gate in gates]),
        )

    def _router_loss(self, gate: GateOutput) -> Tensor:
        """The mean over all H groups of each one's losses, as of a MoE layer of its experts alone.

        Of the groups here; those of all ranks add up to the whole (our choice: the paper names no
        loss).
        """
        config = self.config
        num_tokens = max(gate.ids.shape[0] // len(self.groups), 1)
        num_choices = num_tokens * (config.top_k // self.num_groups)
        counts_HE = gate.counts.view(self.num_groups, -1)
        load_GE = counts_HE[self.groups.start : self.groups.stop] / num_choices
        balance_G = load_GE.shape[1] * (load_GE * (gate.prob_sum / num_tokens)).sum(dim=1)
        loss_G = (
            config.balance_loss_coefficient * balance_G
            + config.z_loss_coefficient * gate.z_sum / num_tokens
        )
        return loss_G.sum() / self.num_groups
