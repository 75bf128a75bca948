# SPDX-License-Identifier: Apache-2.0
"""What all layers with a router and experts have: who holds which expert, statistics, losses.

T tokens, D model width, E experts, E_local those held here, K experts per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.nn.config import MoEConfig
from fomoe.nn.experts import Experts
from fomoe.nn.statistics import RouterStatistics, router_statistics
from fomoe.nn.validation import require_resident_experts
from fomoe.ops import GateOutput, route

__all__ = ["RoutedLayer", "auxiliary_loss"]


class RoutedLayer(nn.Module):
    """A router and the experts that are held here; subclasses say who chooses what.

    Parameters
    ----------
    config : MoEConfig
    resident_experts : Sequence[int], optional
        Ascending global ids of the experts held here, all of them by default; may be empty.
    exchange : ExpertExchange, optional
        Makes the layer expert-parallel.

    Raises
    ------
    ValueError
        As :class:`fomoe.MoE`.
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
        # The experts that can be chosen here.
        self.candidates: Sequence[int] = range(config.num_experts)
        if not full:
            self.candidates = reachable
        buffers = {
            "expert_map": torch.empty(config.num_experts, dtype=torch.int32),
            "reachable": torch.empty(config.num_experts, dtype=torch.bool),
            "expert_counts": torch.empty(config.num_experts, dtype=torch.int64),
            "num_rows": torch.empty((), dtype=torch.int64),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self._fill_buffers()
        self._auxiliary_loss: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.expert_map.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.expert_map.is_meta:  # to_empty(): what is there now means nothing
            self.reset_buffers()
        return self

    def reset_buffers(self) -> None:
        """Fill the buffers, which ``to_empty()`` leaves undefined; clears statistics."""
        self._fill_buffers()

    def _fill_buffers(self) -> None:
        rows = [-1] * self.config.num_experts
        for row, expert in enumerate(self.experts.expert_ids):
            rows[expert] = row
        self.expert_map.copy_(torch.tensor(rows, dtype=torch.int32))
        self.reachable.zero_()
        self.reachable[list(self.reachable_experts)] = True
        self.reset_statistics()

    def _exchanged(self, exchange: ExpertExchange, x_TD: Tensor, gate: GateOutput) -> Tensor:
        """The tokens to the ranks of their experts, through these, and back."""
        rows, ids, weights, trip = exchange.dispatch(
            self.experts.in_compute_dtype(x_TD), gate.ids, gate.weights
        )
        routing = route(ids, self.expert_map, self.experts.num_experts)
        return exchange.combine(self.experts(rows, weights, routing), trip)

    def _router_loss(self, gate: GateOutput) -> Tensor:
        """See :attr:`auxiliary_loss`."""
        raise NotImplementedError

    def _observe(self, gate: GateOutput, num_rows: Tensor) -> bool:
        """Keep the auxiliary loss and add to the statistics, without waiting for the device.

        Returns whether this was a forward that counts: no export, no recomputation.
        """
        if _is_exporting():  # an exported program is for inference
            return False
        loss = self._router_loss(gate)  # again in a recompute: checkpoint wants the same tensors
        if _in_backward():
            return False
        self._auxiliary_loss = loss
        # Not +=, which sets the attribute: torch.compile could then not list the modules.
        self.expert_counts.add_(gate.counts)
        self.num_rows.add_(num_rows)
        return True

    @property
    def auxiliary_loss(self) -> Tensor:
        """Balance and z loss times their coefficients, of the last forward; scalar with graph.

        Of :class:`fomoe.MoE`: balance = E * sum_e load_e * (prob_sum_e / T), where load_e is the
        share of the choices that fell on e: counts_e / (T * K). It is 1 for a uniform router.
        z = z_sum / T. Over this layer's own tokens and all E experts, ghosts and drops included;
        for a partitioned router over the residents alone, E of them, and over the choices they
        allow. Our choice, after Switch Transformer (balance) and ST-MoE (z): the FoMoE paper names
        no loss.

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
    """Sum of the auxiliary losses of the layers of ``model``; 0 if none has a router."""
    losses = [
        module.auxiliary_loss for module in model.modules() if isinstance(module, RoutedLayer)
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


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
