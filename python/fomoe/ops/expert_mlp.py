# SPDX-License-Identifier: Apache-2.0
"""expert_mlp: the resident experts of a layer, from tokens to weighted sums, in one op."""

from typing import Any, Literal

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import (
    FLOATS,
    check,
    check_code,
    check_devices,
    check_routing,
    check_tensor,
    sum_dtype,
)
from fomoe.ops._names import ACTIVATIONS, code_of
from fomoe.ops.types import Routing


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: Routing,
    activation: Literal["swiglu", "silu", "swiglu_clamped"] = "swiglu",
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * expert(x[t])`` over the resident experts that t chose.

    expert(x) = act(x w1^T + b1) w2^T + b2, where act is

    - ``swiglu``: silu(gate) * up;
    - ``silu``: the FoMoE paper's two-matrix expert (arXiv 2606.19025);
    - ``swiglu_clamped``: g * sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up clamped
      to [-7, 7], as in gpt-oss (arXiv 2508.10925); a clamped value has no gradient.

    The pre-activation, the activation and each expert's output are rounded once to the dtype of x.
    Only x and the pre-activation are kept for the backward, and nothing when no input requires a
    gradient: the gradient of a weight is <d_hidden, hidden> + <grad_y, b2>, which needs no expert
    output.

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
        Any strides; a non-contiguous input is copied.
    weights : Tensor, (T, K), float64 for float64 x, else float32
    w1 : Tensor, (E_local, 2*F, D), gate rows before up rows; (E_local, F, D) for silu
    w2 : Tensor, (E_local, D, F)
        Both in the dtype of x. Copied only if neither of their last two axes is dense.
    routing : Routing
        From :func:`fomoe.ops.route`.
    activation : "swiglu", "silu" or "swiglu_clamped"
    b1 : Tensor, (E_local, rows of w1), dtype of x; or None
    b2 : Tensor, (E_local, D), dtype of x; or None

    Returns
    -------
    Tensor, (T, D), dtype of x
        Differentiable in x, weights, w1, w2, b1 and b2; the gradients of frozen experts and of an x
        that requires none are not computed. A token all of whose experts are ghosts gets zeros; an
        expert without tokens gets exactly zero gradients. As deterministic as torch.mm for a fixed
        number of threads.

    Raises
    ------
    RuntimeError
        When a shape, dtype or setting does not fit, or the routing is not one that route makes; the
        message names op, argument, expected, got.
    """
    code = code_of("expert_mlp", "activation", activation, ACTIVATIONS)
    keep_pre_activation = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weights, w1, w2, b1, b2)
    )
    y: Tensor = torch.ops.fomoe.expert_mlp(
        x, weights, w1, w2, b1, b2, *routing, code, keep_pre_activation
    )[0]
    return y


def _check_layer(
    op: str,
    layer: dict[str, Tensor | None],
    routing: tuple[Tensor, Tensor, Tensor],
    activation: int,
) -> None:
    """Checks x, weights, w1, w2, b1 and b2 of ``layer`` against each other and the routing."""
    names = ("slot_to_row", "row_to_slot", "offsets")
    check_devices(op, layer | dict(zip(names, routing, strict=True)))
    x, weights, w1, w2 = (layer[name] for name in ("x", "weights", "w1", "w2"))
    assert x is not None
    assert weights is not None
    assert w1 is not None
    assert w2 is not None
    check_code(op, "activation", activation, ACTIVATIONS)
    num_tokens, top_k, num_local_experts = check_routing(op, *routing)
    check_tensor(op, "x", x, FLOATS, (num_tokens, None), "(T, D)")
    check_tensor(op, "weights", weights, (sum_dtype(x.dtype),), (num_tokens, top_k), "(T, K)")
    dim = x.shape[1]
    check_tensor(op, "w2", w2, (x.dtype,), (num_local_experts, dim, None), "(E_local, D, F)")
    if activation == ACTIVATIONS["silu"]:
        width, letters = w2.shape[2], "F"
    else:
        width, letters = 2 * w2.shape[2], "2*F"
    check(
        dim > 0 and w2.shape[2] > 0,
        lambda: f"fomoe::{op}: D and F must be at least 1, got w2 of shape {tuple(w2.shape)}",
    )
    shape = (num_local_experts, width, dim)
    check_tensor(op, "w1", w1, (x.dtype,), shape, f"(E_local, {letters}, D)")
    for name, size, legend in (("b1", width, letters), ("b2", dim, "D")):
        bias = layer[name]
        if bias is not None:
            shape_of_bias = (num_local_experts, size)
            check_tensor(op, name, bias, (x.dtype,), shape_of_bias, f"(E_local, {legend})")


@torch.library.register_fake("fomoe::expert_mlp")
def _fake(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
    activation: int,
    keep_pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    layer = {"x": x, "weights": weights, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    _check_layer("expert_mlp", layer, (slot_to_row, row_to_slot, offsets), activation)
    num_kept_rows = row_to_slot.shape[0] if keep_pre_activation else 0
    return x.new_empty(x.shape), x.new_empty(num_kept_rows, w1.shape[1])


@torch.library.register_fake("fomoe::expert_mlp_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    pre_activation: Tensor,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
    activation: int,
    needs_x: bool,
    needs_experts: bool,
) -> tuple[Tensor, ...]:
    op = "expert_mlp_backward"
    layer = {"x": x, "weights": weights, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    check_devices(op, {"x": x, "grad_y": grad_y, "pre_activation": pre_activation})
    _check_layer(op, layer, (slot_to_row, row_to_slot, offsets), activation)
    pre_shape = (row_to_slot.shape[0], w1.shape[1])
    check_tensor(op, "grad_y", grad_y, (x.dtype,), x.shape, "(T, D)")
    check_tensor(op, "pre_activation", pre_activation, (x.dtype,), pre_shape, "(T*K, rows of w1)")
    num_tokens = x.shape[0] if needs_x else 0
    num_experts = w1.shape[0] if needs_experts else 0
    return (
        x.new_empty(num_tokens, x.shape[1]),
        weights.new_empty(weights.shape),
        w1.new_empty(num_experts, *w1.shape[1:]),
        w2.new_empty(num_experts, *w2.shape[1:]),
        x.new_empty(num_experts if b1 is not None else 0, w1.shape[1]),
        x.new_empty(num_experts if b2 is not None else 0, x.shape[1]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, w1, w2, b1, b2, *routing, ctx.activation, _ = inputs
    pre_activation = output[1]
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # else autograd fills zeros as large as the pre-activation
    ctx.save_for_backward(x, weights, w1, w2, b1, b2, pre_activation, *routing)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_pre_activation: None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 11
    needs_x, _, *needs_expert = ctx.needs_input_grad[:6]
    gradients = torch.ops.fomoe.expert_mlp_backward(
        grad_y, *ctx.saved_tensors, ctx.activation, needs_x, any(needs_expert)
    )
    wanted = (
        gradient if is_needed else None
        for gradient, is_needed in zip(gradients, ctx.needs_input_grad[:6], strict=True)
    )
    return *wanted, None, None, None, None, None


torch.library.register_autograd("fomoe::expert_mlp", _backward, setup_context=_setup_context)
refuse_double_backward("expert_mlp_backward")
