# SPDX-License-Identifier: Apache-2.0
"""Our op as one of the experts implementations of ``transformers``, by the name "fomoe".

Importing this registers it: ``model.set_experts_implementation("fomoe")`` works from then on.

T tokens, D model width, F expert width, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from fomoe.ops import expert_mlp, route

IMPLEMENTATION = "fomoe"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What use_experts_implementation notes on a class, and what expert_mlp computes without a copy.
_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * expert(x[t])``, by the interface of ``transformers``.

    Computes in the autocast dtype if any, else in that of the weights.

    Parameters
    ----------
    experts : nn.Module
        With ``gate_up_proj`` (E, 2F, D), gate rows first, and ``down_proj`` (E, D, F).
    hidden_states : Tensor, (T, D)
    top_k_index : Tensor, (T, K), any integer dtype
    top_k_weights : Tensor, (T, K), any float dtype

    Returns
    -------
    Tensor, (T, D), dtype of hidden_states

    Raises
    ------
    ValueError
        If :func:`why_unfit` has a reason.
    """
    reason = why_unfit(experts)
    if reason is not None:
        raise ValueError(f"experts_implementation 'fomoe': {type(experts).__name__}: {reason}")
    w1, w2 = _weights(experts)
    dtype = _compute_dtype(hidden_states.device.type, w1.dtype)
    num_experts = w1.shape[0]
    expert_map = torch.arange(num_experts, dtype=torch.int32, device=hidden_states.device)
    routing = route(top_k_index.to(torch.int32), expert_map, num_experts)
    y_TD = expert_mlp(
        hidden_states.to(dtype),
        top_k_weights.to(torch.promote_types(dtype, torch.float32)),
        w1.to(dtype),
        w2.to(dtype),
        routing,
    )
    return y_TD.to(hidden_states.dtype)


def why_unfit(experts: nn.Module) -> str | None:
    """Why :func:`experts_forward` would not compute what ``experts`` do, or None if it does."""
    for name, expected in _LAYOUT.items():
        actual = getattr(experts, name, None)
        if actual is not expected:
            return f"expected {name} = {expected}, got {actual}"
    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        return "expected act(gate) * up between the projections, got an _apply_gate of its own"
    if not isinstance(experts.act_fn, (SiLUActivation, nn.SiLU)):
        return f"expected the activation silu, got {type(experts.act_fn).__name__}"
    for name in ("gate_up_proj", "down_proj"):
        weight: Any = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):
            return f"expected {name} to be a plain tensor, got {type(weight).__name__}"
        if weight.dtype not in _FLOATS or weight.dim() != 3:
            return (
                f"expected {name} to have 3 dims of float64, float32, bfloat16 or float16, "
                f"got {tuple(weight.shape)} of {weight.dtype}"
            )
    w1, w2 = _weights(experts)
    num_experts, dim, width = w2.shape
    if w1.shape != (num_experts, 2 * width, dim) or w1.dtype != w2.dtype:
        return (
            f"expected gate_up_proj {(num_experts, 2 * width, dim)} of {w2.dtype} beside down_proj "
            f"{tuple(w2.shape)}, got {tuple(w1.shape)} of {w1.dtype}"
        )
    return None


def _compute_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """As torch's own autocast, which leaves float64 alone; there is none on the meta device."""
    is_available = torch.amp.is_autocast_available(device_type)
    if is_available and torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def _weights(experts: Any) -> tuple[Tensor, Tensor]:
    return experts.gate_up_proj, experts.down_proj


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
