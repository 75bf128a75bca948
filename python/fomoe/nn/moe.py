# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer of which a site may hold only some experts.

The router scores all experts. A chosen expert that is not resident is a ghost: its path adds
nothing and the other chosen experts keep their weights (router mode B of FoMoE, arXiv 2606.19025).

T tokens, D model width, F expert width, E experts, E_local resident ones, K experts per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.nn.statistics import RouterStatistics, router_statistics
from fomoe.nn.validation import (
    require_booleans,
    require_choice,
    require_numbers,
    require_positive_integers,
)
from fomoe.ops import GateOutput, Routing, expert_mlp, route, topk_gate

MAX_EXPERTS = 4096


@dataclass(kw_only=True, slots=True, frozen=True)
class MoEConfig:
    """Shape and losses of one layer; raises ValueError naming the field that does not fit.

    The FoMoE paper's layer is ``activation="silu", score="sigmoid"``. It names no auxiliary loss:
    both coefficients are our choice.
    """

    dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    activation: Literal["swiglu", "silu"] = "swiglu"  # silu: two matrices an expert, no gate
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False  # divide a token's weights by their sum
    scale: float = 1.0  # factor on the weights
    balance_loss_coefficient: float = 1e-2
    z_loss_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_positive_integers(self, ("dim", "expert_dim", "num_experts", "top_k"))
        require_choice(self, "activation", ("swiglu", "silu"))
        require_choice(self, "score", ("softmax", "sigmoid"))
        require_booleans(self, ("renormalize",))
        require_numbers(self, ("scale",), above=0)
        require_numbers(self, ("balance_loss_coefficient", "z_loss_coefficient"))
        if self.num_experts > MAX_EXPERTS:
            raise ValueError(f"num_experts: expected at most {MAX_EXPERTS}, got {self.num_experts}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: expected at most num_experts = {self.num_experts}, got {self.top_k}"
            )


class Experts(nn.Module):
    """The feed-forward weights of some experts, stacked; ``expert_ids[i]`` is the id of row i.

    Parameters: ``w1`` (E_local, 2F, D) for swiglu (gate rows, then up rows) or (E_local, F, D) for
    silu, and ``w2`` (E_local, D, F).
    """

    def __init__(self, config: MoEConfig, expert_ids: Sequence[int]) -> None:
        super().__init__()
        self.activation = config.activation
        self.expert_ids = tuple(expert_ids)
        num_rows = 2 * config.expert_dim if config.activation == "swiglu" else config.expert_dim
        self.w1 = nn.Parameter(torch.empty(len(self.expert_ids), num_rows, config.dim))
        self.w2 = nn.Parameter(torch.empty(len(self.expert_ids), config.dim, config.expert_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal weights with standard deviation 1/sqrt(last dim) from torch's generator."""
        for parameter in (self.w1, self.w2):
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the resident experts' outputs, (T, D), in the autocast dtype if any."""
        device_type = x_TD.device.type
        w1: Tensor = self.w1
        w2: Tensor = self.w2
        # As torch's own autocast, which leaves float64 alone.
        if torch.is_autocast_enabled(device_type) and x_TD.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            x_TD, w1, w2 = x_TD.to(dtype), w1.to(dtype), w2.to(dtype)
        elif x_TD.dtype != w1.dtype:
            raise ValueError(
                f"MoE: expected input of the weights' dtype {w1.dtype}, got {x_TD.dtype}"
            )
        return expert_mlp(x_TD, weights_TK, w1, w2, routing, self.activation)


class MoE(nn.Module):
    """y = sum over the K chosen and resident experts of weight * expert(x).

    Parameters: ``router.weight`` (E, D), ``experts.w1``, ``experts.w2``, see :class:`Experts`.
    Router logits are computed in float32 (float64 for float64), whatever autocast says. With
    sigmoid scores and no renormalisation a ghost's router row gets a gradient from the auxiliary
    loss only.

    Parameters
    ----------
    config : MoEConfig
    resident_experts : Sequence[int], optional
        Ascending global ids of the experts held here, all of them by default; may be empty.

    Raises
    ------
    ValueError
        If ``resident_experts`` is out of range, not ascending or holds an id twice.
    """

    expert_map: Tensor  # (E,) int32: row of each expert in experts.w1 and w2, -1 for a ghost
    expert_counts: Tensor  # (E,) int64: slots that chose each expert since the last reset

    def __init__(self, config: MoEConfig, resident_experts: Sequence[int] | None = None) -> None:
        super().__init__()
        if resident_experts is None:
            resident_experts = range(config.num_experts)
        _check_resident_experts(resident_experts, config.num_experts)
        self.config = config
        self.router = nn.Linear(config.dim, config.num_experts, bias=False)
        self.experts = Experts(config, resident_experts)
        self.register_buffer(
            "expert_map", torch.empty(config.num_experts, dtype=torch.int32), persistent=False
        )
        self.register_buffer(
            "expert_counts", torch.empty(config.num_experts, dtype=torch.int64), persistent=False
        )
        self.reset_buffers()
        self._auxiliary_loss: Tensor | None = None

    def reset_buffers(self) -> None:
        """Fill the buffers, which ``to_empty()`` leaves undefined; clears the statistics."""
        rows = [-1] * self.config.num_experts
        for row, expert in enumerate(self.experts.expert_ids):
            rows[expert] = row
        self.expert_map.copy_(torch.tensor(rows, dtype=torch.int32))
        self.reset_statistics()

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
        gate = topk_gate(
            self._router_logits(x_TD),
            self.config.top_k,
            score=self.config.score,
            renormalize=self.config.renormalize,
            scale=self.config.scale,
        )
        routing = route(gate.ids, self.expert_map, len(self.experts.expert_ids))
        y_TD: Tensor = self.experts(x_TD, gate.weights, routing)
        self._observe(gate)
        return y_TD.reshape(x.shape)

    def _router_logits(self, x_TD: Tensor) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(wide), self.router.weight.to(wide))

    def _observe(self, gate: GateOutput) -> None:
        """Keep the auxiliary loss and add to the statistics, without waiting for the device."""
        num_tokens = max(gate.ids.shape[0], 1)  # no tokens: both losses are 0
        load = gate.counts.to(gate.prob_sum.dtype) / (num_tokens * self.config.top_k)
        balance = self.config.num_experts * (load * (gate.prob_sum / num_tokens)).sum()
        loss = (
            self.config.balance_loss_coefficient * balance
            + self.config.z_loss_coefficient * gate.z_sum / num_tokens
        )
        if not _in_backward():
            self._auxiliary_loss = loss
            # Not +=, which sets the attribute: torch.compile could then not list the modules.
            self.expert_counts.add_(gate.counts)

    @property
    def auxiliary_loss(self) -> Tensor:
        """Balance and z loss times their coefficients, of the last forward; scalar with graph.

        balance = E * sum_e (counts_e / (T * K)) * (prob_sum_e / T), which is 1 for a uniform
        router; z = z_sum / T. Over all E experts and this layer's own tokens, ghosts included. Our
        choice, after Switch Transformer (balance) and ST-MoE (z): the FoMoE paper names no loss.

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
        return router_statistics(self.expert_counts.tolist(), self.experts.expert_ids)

    def reset_statistics(self) -> None:
        """Start counting anew."""
        self.expert_counts.zero_()

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


def _in_backward() -> bool:
    """Whether activation checkpointing is running a forward again.

    Its tokens were counted before, and its loss would keep the layer's recomputed activations
    alive. A compiled layer cannot ask: there a checkpoint from outside counts every token twice,
    which changes no share.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _check_resident_experts(resident_experts: Sequence[int], num_experts: int) -> None:
    previous = -1
    for position, expert in enumerate(resident_experts):
        if not isinstance(expert, int) or not 0 <= expert < num_experts:
            raise ValueError(
                f"resident_experts[{position}]: expected an id in [0, {num_experts}), got {expert}"
            )
        if expert <= previous:
            raise ValueError(
                f"resident_experts[{position}]: expected ascending ids without repetition, "
                f"got {expert} after {previous}"
            )
        previous = expert
