# SPDX-License-Identifier: Apache-2.0
"""topk_gate: choose K experts per token and sum what the router's losses need, in one pass."""

from typing import Any, Literal

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import FLOATS, INT32, check, check_devices, check_tensor, sum_dtype
from fomoe.ops._names import GATE_SCORES, code_of
from fomoe.ops.types import GateOutput


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
) -> GateOutput:
    """Choose ``top_k`` experts per token by logit and weigh them by their probability.

    softmax: p = softmax(logits) and a chosen expert's weight is its p. sigmoid: s =
    sigmoid(logits), the weight is s and p = s / sum_E s. The unnormalised sigmoid weights are the
    FoMoE paper's (arXiv 2606.19025); the probabilities behind ``prob_sum`` and the order of ties
    and NaN are our choice.

    Parameters
    ----------
    logits : Tensor, (T, E), float64 | float32 | bfloat16 | float16
        E up to 4096. Any strides; a non-contiguous input is copied. Selection is by descending
        logit, ties to the lowest index; NaN ranks below -inf. A token with a NaN or +inf logit has
        NaN softmax weights.
    top_k : int
        1 <= top_k <= E.
    score : "softmax" or "sigmoid"
    renormalize : bool
        Divide a token's weights by their sum over K, before ``scale``.
    scale : float
        Factor on the weights.

    Returns
    -------
    GateOutput
        ids (T, K) int32, best first; weights (T, K); counts (E,) int64, the number of slots that
        chose an expert; prob_sum (E,) = sum_t p[t]; z_sum () = sum_t logsumexp(logits[t])^2.
        weights, prob_sum and z_sum are in the accumulation dtype (float64 for float64 logits, else
        float32) and differentiable. Deterministic to the bit, for any number of threads.

    Raises
    ------
    RuntimeError
        When a shape, dtype or setting does not fit; the message names op, argument, expected, got.
    """
    code = code_of("topk_gate", "score", score, GATE_SCORES)
    weights, prob_sum, z_sum, ids, counts = torch.ops.fomoe.topk_gate(
        logits, top_k, code, renormalize, scale
    )
    return GateOutput(ids, weights, counts, prob_sum, z_sum)


def _check_gate(op: str, logits: Tensor, top_k: int) -> None:
    check_tensor(op, "logits", logits, FLOATS, (None, None), "(T, E)")
    num_experts = logits.shape[1]
    check(
        num_experts <= 4096,
        lambda: f"fomoe::{op}: logits must have at most 4096 experts, got {num_experts}",
    )
    check(
        top_k >= 1 and top_k <= num_experts,
        lambda: f"fomoe::{op}: top_k must be in [1, {num_experts}], got {top_k}",
    )


@torch.library.register_fake("fomoe::topk_gate")
def _fake(
    logits: Tensor, top_k: int, score: int, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_gate("topk_gate", logits, top_k)
    num_tokens, num_experts = logits.shape
    dtype = sum_dtype(logits.dtype)
    return (
        logits.new_empty(num_tokens, top_k, dtype=dtype),
        logits.new_empty(num_experts, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty(num_tokens, top_k, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.int64),
    )


@torch.library.register_fake("fomoe::topk_gate_backward")
def _fake_backward(
    grad_weights: Tensor | None,
    grad_prob_sum: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score: int,
    renormalize: bool,
    scale: float,
) -> Tensor:
    op = "topk_gate_backward"
    gradients = {
        "grad_weights": (grad_weights, ids.shape, "(T, K)"),
        "grad_prob_sum": (grad_prob_sum, logits.shape[1:], "(E,)"),
        "grad_z_sum": (grad_z_sum, (), "()"),
    }
    tensors = {name: gradient for name, (gradient, _, _) in gradients.items()}
    check_devices(op, {"logits": logits, "ids": ids, **tensors})
    check_tensor(op, "ids", ids, INT32, (logits.shape[0], None), "(T, K)")
    _check_gate(op, logits, ids.shape[1])
    for name, (gradient, shape, legend) in gradients.items():
        if gradient is not None:
            check_tensor(op, name, gradient, (sum_dtype(logits.dtype),), shape, legend)
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, *ctx.settings = inputs
    ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
    ids = output[3]
    ctx.save_for_backward(logits, ids)


def _backward(
    ctx: Any,
    grad_weights: Tensor | None,
    grad_prob_sum: Tensor | None,
    grad_z_sum: Tensor | None,
    grad_ids: None,
    grad_counts: None,
) -> tuple[Tensor | None, ...]:
    grad_logits = torch.ops.fomoe.topk_gate_backward(
        grad_weights, grad_prob_sum, grad_z_sum, *ctx.saved_tensors, *ctx.settings
    )
    return grad_logits, None, None, None, None


torch.library.register_autograd("fomoe::topk_gate", _backward, setup_context=_setup_context)
refuse_double_backward("topk_gate_backward")
