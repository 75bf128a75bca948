# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer of which a site may hold only some experts.

With a full router, a chosen expert that is not resident is a ghost: its path adds nothing and the
other chosen experts keep their weights (router mode B of FoMoE, arXiv 2606.19025 section 3). With a
partitioned router, only residents are scored and chosen (mode A).

T tokens, D model width, E experts, E_local resident ones, K experts per token.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.nn.balancing import LoadBalancer
from fomoe.nn.config import MoEConfig
from fomoe.nn.experts import Experts, SharedExpert, wide_linear
from fomoe.nn.statistics import RouterStatistics, router_statistics
from fomoe.nn.validation import require_resident_experts
from fomoe.ops import GateOutput, route, topk_gate


class MoE(nn.Module):
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

    expert_map: Tensor  # (E,) int32: row of each expert in experts.w1 and w2, -1 if not here
    reachable: Tensor  # (E,) bool: False for a ghost
    expert_counts: Tensor  # (E,) int64: slots that chose each expert since the last reset
    num_rows: Tensor  # () int64: slots that were executed since the last reset

    def __init__(
        self,
        config: MoEConfig,
        resident_experts: Sequence[int] | None = None,
        exchange: ExpertExchange | None = None,
    ) -> None:
        super().__init__()
        self.exchange = exchange
        if exchange is not None:
            _require_fitting_exchange(exchange, config, resident_experts)
            resident_experts = exchange.experts
        elif resident_experts is None:
            resident_experts = range(config.num_experts)
        require_resident_experts(resident_experts, config.num_experts)
        self.config = config
        self.router = nn.Linear(
            config.dim, config.num_experts, bias=config.has_bias or config.router_bias
        )
        self.experts = Experts(config, resident_experts)
        # The experts that are no ghosts.
        reachable = self.experts.expert_ids if exchange is None else exchange.all_experts
        full = config.router == "full"
        # Whose row is whose, see fomoe.nn.naming.
        self.router.expert_ids = tuple(  # type: ignore[assignment]
            expert if full or expert in reachable else None for expert in range(config.num_experts)
        )
        reaches_all = exchange is not None and len(reachable) == config.num_experts
        self.router.on_every_site = full or reaches_all  # type: ignore[assignment]
        self.reachable_experts: Sequence[int] = reachable
        self.shared_expert = SharedExpert(config) if config.shared_expert_dim > 0 else None
        # The experts that can be chosen here.
        self.candidates: Sequence[int] = range(config.num_experts)
        if config.router == "partitioned":
            self.candidates = reachable
        self.capacity_per_token = _capacity_per_token(config, len(self.candidates))
        self.load_balancer: LoadBalancer | None = None
        if config.bias_update_rate > 0:
            self.load_balancer = LoadBalancer(
                config.num_experts, self.candidates, config.bias_update_rate
            )
        buffers = {
            "expert_map": torch.empty(config.num_experts, dtype=torch.int32),
            "reachable": torch.empty(config.num_experts, dtype=torch.bool),
            "expert_counts": torch.empty(config.num_experts, dtype=torch.int64),
            "num_rows": torch.empty((), dtype=torch.int64),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.reset_buffers()
        self._auxiliary_loss: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.expert_map.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.expert_map.is_meta:  # to_empty(): what is there now means nothing
            self.reset_buffers()
        return self

    def reset_buffers(self) -> None:
        """Fill the buffers, which ``to_empty()`` leaves undefined; clears statistics and biases."""
        rows = [-1] * self.config.num_experts
        for row, expert in enumerate(self.experts.expert_ids):
            rows[expert] = row
        self.expert_map.copy_(torch.tensor(rows, dtype=torch.int32))
        self.reachable.zero_()
        self.reachable[list(self.reachable_experts)] = True
        self.reset_statistics()
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

    def _exchanged(self, exchange: ExpertExchange, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """The tokens to the ranks of their experts, through these, and back."""
        rows, ids, weights, trip = exchange.dispatch(
            self.experts.in_compute_dtype(x_TD), gate.ids, gate.weights
        )
        routing = route(ids, self.expert_map, self.experts.num_experts)
        return exchange.combine(self.experts(rows, weights, routing), trip)

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

    def _observe(self, gate: GateOutput, num_rows: Tensor) -> None:
        """Keep the auxiliary loss and add to the statistics, without waiting for the device."""
        if _is_exporting():  # an exported program is for inference
            return
        loss = self._router_loss(gate)  # again in a recompute: checkpoint wants the same tensors
        if _in_backward():
            return
        self._auxiliary_loss = loss
        # Not +=, which sets the attribute: torch.compile could then not list the modules.
        self.expert_counts.add_(gate.counts)
        self.num_rows.add_(num_rows)
        if self.load_balancer is not None and self.training:
            self.load_balancer.counts.add_(gate.counts)

    def _router_loss(self, gate: GateOutput) -> Tensor:
        num_tokens = max(gate.ids.shape[0], 1)  # no tokens: both losses are 0
        num_choices = gate.counts.sum().clamp(min=1)
        load = gate.counts.to(gate.prob_sum.dtype) / num_choices
        balance = len(self.candidates) * (load * (gate.prob_sum / num_tokens)).sum()
        return (
            self.config.balance_loss_coefficient * balance
            + self.config.z_loss_coefficient * gate.z_sum / num_tokens
        )

    @property
    def auxiliary_loss(self) -> Tensor:
        """Balance and z loss times their coefficients, of the last forward; scalar with graph.

        balance = E * sum_e load_e * (prob_sum_e / T), where load_e is the share of the choices that
        fell on e: counts_e / (T * K). It is 1 for a uniform router. z = z_sum / T. Over this
        layer's own tokens and all E experts, ghosts and drops included; for a partitioned router
        over the residents alone, E of them, and over the choices they allow. Our choice, after
        Switch Transformer (balance) and ST-MoE (z): the FoMoE paper names no loss.

        Raises
        ------
        RuntimeError
            If no forward has run since the layer was made, copied or loaded; or, in training, if
            the last one ran without gradients, so that the loss would silently do nothing.
        """
        if self._auxiliary_loss is None:
            raise RuntimeError("MoE: auxiliary_loss is there after a forward, and none has run")
        expects_graph = (
            self.training and torch.is_grad_enabled() and self.router.weight.requires_grad
        )
        if expects_graph and not self._auxiliary_loss.requires_grad:
            raise RuntimeError(
                "MoE: auxiliary_loss has no gradient, because the last forward ran without: "
                "with activation checkpointing, set use_reentrant=False"
            )
        return self._auxiliary_loss

    def statistics(self) -> RouterStatistics:
        """What the router did since the last reset. Waits for the device."""
        return router_statistics(
            self.expert_counts.tolist(),
            candidates=self.candidates,
            resident=self.reachable_experts,
            num_rows=int(self.num_rows),
        )

    def reset_statistics(self) -> None:
        """Start counting anew."""
        self.expert_counts.zero_()
        self.num_rows.zero_()

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled.
        return {**self.__dict__, "_auxiliary_loss": None}

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"dim={config.dim}, expert_dim={config.expert_dim}, num_experts={config.num_experts}, "
            f"resident={len(self.experts.expert_ids)}, top_k={config.top_k}"
        )


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of :attr:`MoE.auxiliary_loss` over the layers of ``model``; 0 if it has none."""
    losses = [module.auxiliary_loss for module in model.modules() if isinstance(module, MoE)]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _capacity_per_token(config: MoEConfig, num_candidates: int) -> tuple[int, int] | None:
    """Numerator and denominator of the factor times the even load of a single token."""
    if config.capacity_factor is None or num_candidates == 0:
        return None
    factor = Fraction(config.capacity_factor).limit_denominator(10**6)
    share = factor * min(config.top_k, num_candidates) / num_candidates
    return share.numerator, share.denominator


def _require_fitting_exchange(
    exchange: ExpertExchange, config: MoEConfig, resident_experts: Sequence[int] | None
) -> None:
    if resident_experts is not None:
        raise ValueError(
            "resident_experts: expected none beside exchange, which says who owns what"
        )
    if len(exchange.owners) != config.num_experts:
        raise ValueError(
            f"exchange: expected owners of num_experts = {config.num_experts} experts, "
            f"got {len(exchange.owners)}"
        )
    if config.capacity_factor is not None:
        raise ValueError(
            f"capacity_factor: expected None for an expert-parallel layer, "
            f"got {config.capacity_factor}"
        )


def _is_exporting() -> bool:
    """What torch.compiler.is_exporting() says, which torch 2.11 compiles to True everywhere."""
    return torch.compiler._is_exporting_flag


def _in_backward() -> bool:
    """Whether activation checkpointing is running a forward again.

    Its tokens were counted before, and its loss would keep the layer's recomputed activations
    alive. A compiled layer cannot ask: there a checkpoint from outside counts every token twice,
    which changes no share. A checkpoint inside what is compiled counts once, but torch wants
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`` to be set.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
