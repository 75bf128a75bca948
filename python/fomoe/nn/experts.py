# SPDX-License-Identifier: Apache-2.0
"""The feed-forward experts: those a router chooses among, and the one every token passes through.

T tokens, D model width, F expert width, E_local resident experts, K experts per token, P rows of
w1: 2F for swiglu and swiglu_clamped (gate rows, then up rows), F for silu.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.nn.config import MoEConfig
from fomoe.ops import Routing, expert_mlp, route


class Weights(NamedTuple):
    """The parameters of one or several experts, as the op takes them."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


class FeedForward(nn.Module):
    """The parameters of experts of one width, each with the axes ``stack`` in front."""

    def __init__(self, config: MoEConfig, stack: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.activation = config.activation
        num_rows = width if config.activation == "silu" else 2 * width
        self.w1 = nn.Parameter(torch.empty(*stack, num_rows, config.dim))
        self.w2 = nn.Parameter(torch.empty(*stack, config.dim, width))
        self.b1 = nn.Parameter(torch.empty(*stack, num_rows)) if config.has_bias else None
        self.b2 = nn.Parameter(torch.empty(*stack, config.dim)) if config.has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw normal weights with standard deviation 1/sqrt(last dim); biases are zero."""
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def in_compute_dtype(self, x_TD: Tensor) -> Tensor:
        """x in the dtype to compute in: the autocast dtype if any.

        Raises
        ------
        ValueError
            Without autocast, x is not of the weights' dtype.
        """
        device_type = x_TD.device.type
        # As torch's own autocast, which leaves float64 alone.
        if torch.is_autocast_enabled(device_type) and x_TD.dtype != torch.float64:
            return x_TD.to(torch.get_autocast_dtype(device_type))
        if x_TD.dtype != self.w1.dtype:
            raise ValueError(
                f"MoE: expected input of the weights' dtype {self.w1.dtype}, got {x_TD.dtype}"
            )
        return x_TD

    def _operands(self, x_TD: Tensor) -> tuple[Tensor, Weights]:
        """x and the parameters in the dtype to compute in."""
        x_TD = self.in_compute_dtype(x_TD)
        dtype = x_TD.dtype
        biases = [None if bias is None else bias.to(dtype) for bias in (self.b1, self.b2)]
        return x_TD, Weights(self.w1.to(dtype), self.w2.to(dtype), *biases)


class Experts(FeedForward):
    """Experts that a router chooses among, stacked; ``expert_ids[i]`` is the id of row i.

    Parameters: ``w1`` (E_local, P, D) and ``w2`` (E_local, D, F); with ``config.has_bias`` also
    ``b1`` (E_local, P) and ``b2`` (E_local, D).
    """

    def __init__(self, config: MoEConfig, expert_ids: Sequence[int]) -> None:
        super().__init__(config, (len(expert_ids),), config.expert_dim)
        self.expert_ids = tuple(map(int, expert_ids))
        self.num_experts = len(self.expert_ids)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the resident experts' outputs, (T, D), in the autocast dtype if any."""
        x_TD, (w1, w2, b1, b2) = self._operands(x_TD)
        return expert_mlp(x_TD, weights_TK, w1, w2, routing, self.activation, b1=b1, b2=b2)


class SharedExpert(FeedForward):
    """An expert that every token passes through; whoever holds the layer holds it.

    Parameters: ``w1`` (P, D) and ``w2`` (D, F), where F is ``config.shared_expert_dim``; with
    ``config.has_bias`` also ``b1`` (P,) and ``b2`` (D,); with ``config.shared_expert_gate`` also
    ``gate.weight`` (1, D), and the output is weighed by sigmoid(gate . x), as in Qwen2-MoE.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config, (), config.shared_expert_dim)
        self.gate = nn.Linear(config.dim, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """The output, (T, D), with the op, the dtypes and the roundings of the other experts."""
        num_tokens = x_TD.shape[0]
        if self.gate is None:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            weights_T1 = x_TD.new_ones(num_tokens, 1, dtype=wide)
        else:
            weights_T1 = wide_linear(x_TD, self.gate).sigmoid()
        ids_T1 = torch.zeros(num_tokens, 1, dtype=torch.int32, device=x_TD.device)
        routing = route(ids_T1, expert_map=ids_T1.new_zeros(1), num_local_experts=1)
        x_TD, (w1, w2, b1, b2) = self._operands(x_TD)
        if b1 is not None and b2 is not None:
            b1, b2 = b1[None], b2[None]
        return expert_mlp(
            x_TD, weights_T1, w1[None], w2[None], routing, self.activation, b1=b1, b2=b2
        )


def wide_linear(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(x)`` in float32 (float64 for float64 x), whatever autocast says."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    bias = None if linear.bias is None else linear.bias.to(wide)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), linear.weight.to(wide), bias)
