# SPDX-License-Identifier: Apache-2.0
"""expert_mlp: the resident experts of a layer, from tokens to weighted sums, in one op."""

from typing import Any, Literal

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import FLOATS, check_devices, check_routing, check_tensor, sum_dtype
from fomoe.ops._names import ACTIVATIONS, code_of
from fomoe.ops.types import Routing


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: Routing,
    activation: Literal["swiglu", "silu"] = "swiglu",
) -> Tensor:
    """``y[t] = sum_k weights[t, k] * expert(x[t])`` over the resident experts that t chose.

    expert(x) = act(x w1^T) w2^T, where act is ``swiglu``, silu(gate) * up, or ``silu``, the FoMoE
    paper's two-matrix expert (arXiv 2606.19025). The pre-activation, the activation and each
    expert's output are rounded to the dtype of x. Only x and the pre-activation are kept for the
    backward: the gradient of a weight is <d_hidden, hidden>, which needs no expert output.

    Parameters
    ----------
    x : Tensor, (T, D), float64 | float32 | bfloat16 | float16
        Any strides; a non-contiguous input is copied.
    weights : Tensor, (T, K), float64 for float64 x, else float32
    w1 : Tensor, (E_local, 2*F, D) for swiglu, gate rows before up rows; (E_local, F, D) for silu
    w2 : Tensor, (E_local, D, F)
        Both in the dtype of x. Copied only if neither of their last two axes is dense.
    routing : Routing
        From :func:`fomoe.ops.route`.
    activation : "swiglu" or "silu"

    Returns
    -------
    Tensor, (T, D), dtype of x
        Differentiable in x, weights, w1 and w2. A token all of whose experts are ghosts gets
        zeros; an expert without tokens gets exactly zero gradients. As deterministic as torch.mm
        for a fixed number of threads.

    Raises
    ------
    RuntimeError
        When a shape, dtype or setting does not fit; the message names op, argument, expected, got.
    """
    code = code_of("expert_mlp", "activation", activation, ACTIVATIONS)
    y: Tensor = torch.ops.fomoe.expert_mlp(x, weights, w1, w2, *routing, code)[0]
    return y


def _check_layer(
    op: str,
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    activation: int,
) -> None:
    names = ("slot_to_row", "row_to_slot", "offsets")
    layer = {"x": x, "weights": weights, "w1": w1, "w2": w2}
    check_devices(op, layer | dict(zip(names, routing, strict=True)))
    num_tokens, top_k, num_local_experts = check_routing(op, *routing)
    check_tensor(op, "x", x, FLOATS, (num_tokens, None), "(T, D)")
    check_tensor(op, "weights", weights, (sum_dtype(x.dtype),), (num_tokens, top_k), "(T, K)")
    dim = x.shape[1]
    check_tensor(op, "w2", w2, (x.dtype,), (num_local_experts, dim, None), "(E_local, D, F)")
    if activation == ACTIVATIONS["swiglu"]:
        width, legend = 2 * w2.shape[2], "(E_local, 2*F, D)"
    else:
        width, legend = w2.shape[2], "(E_local, F, D)"
    check_tensor(op, "w1", w1, (x.dtype,), (num_local_experts, width, dim), legend)


@torch.library.register_fake("fomoe::expert_mlp")
def _fake(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor]:
    routing = (slot_to_row, row_to_slot, offsets)
    _check_layer("expert_mlp", x, weights, w1, w2, routing, activation)
    return x.new_empty(x.shape), x.new_empty(row_to_slot.shape[0], w1.shape[1])


@torch.library.register_fake("fomoe::expert_mlp_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre_activation: Tensor,
    slot_to_row: Tensor,
    row_to_slot: Tensor,
    offsets: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op, routing = "expert_mlp_backward", (slot_to_row, row_to_slot, offsets)
    check_devices(op, {"x": x, "grad_y": grad_y, "pre_activation": pre_activation})
    _check_layer(op, x, weights, w1, w2, routing, activation)
    pre_shape = (row_to_slot.shape[0], w1.shape[1])
    check_tensor(op, "grad_y", grad_y, (x.dtype,), x.shape, "(T, D)")
    check_tensor(op, "pre_activation", pre_activation, (x.dtype,), pre_shape, "(T*K, rows of w1)")
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        w1.new_empty(w1.shape),
        w2.new_empty(w2.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, w1, w2, *routing, ctx.activation = inputs
    pre_activation = output[1]
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # else autograd fills zeros as large as the pre-activation
    ctx.save_for_backward(x, weights, w1, w2, pre_activation, *routing)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_pre_activation: None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 8
    gradients = torch.ops.fomoe.expert_mlp_backward(grad_y, *ctx.saved_tensors, ctx.activation)
    return *gradients, None, None, None, None


torch.library.register_autograd("fomoe::expert_mlp", _backward, setup_context=_setup_context)
refuse_double_backward("expert_mlp_backward")
