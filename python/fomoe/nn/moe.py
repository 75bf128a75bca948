# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer of which a site may hold only some experts.

With a full router, a chosen expert that is not resident is a ghost: its path adds nothing and the
other chosen experts keep their weights (router mode B of FoMoE, arXiv 2606.19025 section 3). With a
partitioned router, only residents are scored and chosen (mode A).

T tokens, D model width, E experts, E_local resident ones, K experts per token.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from fomoe.comm import ExpertExchange
from fomoe.nn.balancing import LoadBalancer
from fomoe.nn.config import MoEConfig
from fomoe.nn.experts import SharedExpert, wide_linear
from fomoe.nn.routed_layer import RoutedLayer
from fomoe.ops import GateOutput, route, topk_gate


class MoE(RoutedLayer):
    """y = sum over the K chosen and resident experts of weight * expert(x), + shared expert(x).

    Parameters: ``router.weight`` (E, D), ``experts.w1``, ``experts.w2``, see
    :class:`fomoe.nn.experts.Experts`; if configured, also ``router.bias`` (E,), ``experts.b1``,
    ``experts.b2`` and those of ``shared_expert``, see :class:`fomoe.nn.experts.SharedExpert`. The
    state has a buffer more, ``load_balancer.bias``, if ``config.bias_update_rate`` is not 0.

    Router logits and the shared expert's gate are computed in float32 (float64 for float64),
    whatever autocast says. With a full router, sigmoid scores and no renormalisation, a ghost's
    router row gets a gradient from the auxiliary loss only; with a partitioned router, the rows of
    experts that are not resident get exactly none.

    With a capacity factor, an expert takes at most ``ceil(factor * even load)`` tokens of a
    forward, the earlier ones; for a later one it adds nothing. The even load is T * K / E over the
    experts that can be chosen: E, or for a partitioned router the residents, and at most as many
    choices a token. The factor counts as the nearest fraction with a denominator up to a million.

    Parameters
    ----------
    config : MoEConfig
    resident_experts : Sequence[int], optional
        Ascending global ids of the experts held here, all of them by default; may be empty.
    exchange : ExpertExchange, optional
        Makes the layer expert-parallel: the experts this rank owns are held here, tokens travel to
        those of other ranks and back, and only experts that no rank owns are ghosts. Every forward
        and backward is then a collective call of all ranks.

    Raises
    ------
    ValueError
        If ``resident_experts`` is out of range, not ascending or holds an id twice, or stands
        beside ``exchange``; if ``exchange`` is of another number of experts, or the layer has a
        capacity, which only the tokens of all ranks together could fill.
    """

    def __init__(
        self,
        config: MoEConfig,
        resident_experts: Sequence[int] | None = None,
        exchange: ExpertExchange | None = None,
    ) -> None:
        super().__init__(config, resident_experts, exchange)
        self.shared_expert = SharedExpert(config) if config.shared_expert_dim > 0 else None
        self.capacity_per_token = _capacity_per_token(config, len(self.candidates))
        self.load_balancer: LoadBalancer | None = None
        if config.bias_update_rate > 0:
            self.load_balancer = LoadBalancer(
                config.num_experts, self.candidates, config.bias_update_rate
            )
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the buffers, which ``to_empty()`` leaves undefined; clears statistics and biases."""
        super().reset_buffers()
        if self.load_balancer is not None:
            self.load_balancer.reset_buffers()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to every vector of x.

        Parameters
        ----------
        x : Tensor, (..., D), float64 | float32 | bfloat16 | float16
            Of the weights' dtype, unless autocast is on. There may be no tokens at all.

        Returns
        -------
        Tensor, (..., D), dtype of x, or the autocast dtype

        Raises
        ------
        ValueError
            If the last dim is not ``config.dim`` or the dtype does not fit.
        """
        if x.dim() == 0 or x.shape[-1] != self.config.dim:
            raise ValueError(
                f"MoE: expected input of shape (..., {self.config.dim}), got {tuple(x.shape)}"
            )
        x_TD = x.reshape(math.prod(x.shape[:-1]), self.config.dim)
        gate = self._choose(x_TD)
        if self.exchange is None:
            capacity = self._capacity(x_TD.shape[0])
            routing = route(gate.ids, self.expert_map, self.experts.num_experts, capacity=capacity)
            y_TD: Tensor = self.experts(x_TD, gate.weights, routing)
            num_rows = routing.offsets[-1]
        else:
            y_TD = self._exchanged(self.exchange, x_TD, gate)
            num_rows = gate.counts[self.reachable].sum()
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        self._observe(gate, num_rows)
        return y_TD.reshape(x.shape)

    def _choose(self, x_TD: Tensor) -> GateOutput:
        config = self.config
        logits = wide_linear(x_TD, self.router)
        balancer = self.load_balancer
        return topk_gate(
            logits,
            config.top_k,
            score=config.score,
            score_after_top_k=config.score_after_top_k,
            bias=None if balancer is None else balancer.bias.to(logits.dtype),
            resident=self.reachable if config.router == "partitioned" else None,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            group_score=config.group_score,
            renormalize=config.renormalize,
            scale=config.scale,
        )

    def _capacity(self, num_tokens: int) -> int | None:
        """Most tokens that an expert takes of a forward with ``num_tokens``; None for all."""
        if self.capacity_per_token is None:
            return None
        # In integers: a compiler may reorder a product of floats and round it to another capacity.
        numerator, denominator = self.capacity_per_token
        return -(-numerator * num_tokens // denominator)

    def _observe(self, gate: GateOutput, num_rows: Tensor) -> bool:
        counts = super()._observe(gate, num_rows)
        if counts and self.load_balancer is not None and self.training:
            self.load_balancer.counts.add_(gate.counts)
        return counts

    def _router_loss(self, gate: GateOutput) -> Tensor:
        num_tokens = max(gate.ids.shape[0], 1)  # no tokens: both losses are 0
        num_choices = gate.counts.sum().clamp(min=1)
        load = gate.counts.to(gate.prob_sum.dtype) / num_choices
        balance = len(self.candidates) * (load * (gate.prob_sum / num_tokens)).sum()
        return (
            self.config.balance_loss_coefficient * balance
            + self.config.z_loss_coefficient * gate.z_sum / num_tokens
        )


def _capacity_per_token(config: MoEConfig, num_candidates: int) -> tuple[int, int] | None:
    """Numerator and denominator of the factor times the even load of a single token."""
    if config.capacity_factor is None or num_candidates == 0:
        return None
    factor = Fraction(config.capacity_factor).limit_denominator(10**6)
    share = factor * min(config.top_k, num_candidates) / num_candidates
    return share.numerator, share.denominator
