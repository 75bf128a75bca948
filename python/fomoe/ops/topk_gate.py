# SPDX-License-Identifier: Apache-2.0
"""topk_gate: choose K experts per token and sum what the router's losses need, in one pass."""

from typing import Any, Literal

import torch
from torch import Tensor

from fomoe.ops._autograd import refuse_double_backward
from fomoe.ops._checks import (
    FLOATS,
    INT32,
    check,
    check_code,
    check_devices,
    check_tensor,
    sum_dtype,
)
from fomoe.ops._names import GATE_SCORES, GROUP_SCORES, code_of
from fomoe.ops.types import GateOutput

MAX_EXPERTS = 4096


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid", "unit"] = "softmax",
    score_after_top_k: bool = False,
    bias: Tensor | None = None,
    resident: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    renormalize: bool = False,
    scale: float = 1.0,
) -> GateOutput:
    """Choose ``top_k`` experts per token by score and weigh them by their value.

    Everything below is over the eligible experts: all, or those with ``resident[e]``. The others
    act as if their logits were not there, NaN included: they are in no softmax, sum or group, and
    their gradient is 0.

    ========  ==================  =====================================
    score     value v             probability p
    ========  ==================  =====================================
    softmax   softmax(logits)     softmax(logits)
    sigmoid   sigmoid(logits)     v / sum_E v, or 0 if that sum is 0
    unit      1                   softmax(logits)
    ========  ==================  =====================================

    A chosen expert's weight is its v; with ``renormalize`` divided by the sum of v over the chosen,
    or 0 with zero gradient if that sum is 0; then times ``scale``.

    Experts are chosen by logit + bias; for sigmoid scores by sigmoid(logit) + bias, unless there is
    neither a bias nor a sum over a group, where only the order matters and the logit does not
    saturate. The larger score is better, ties go to the lowest index, -0 equals +0, NaN ranks below
    -inf. The score is computed in the accumulation dtype in steps of
    ``csrc/include/fomoe/score.h`` that give the same bits on every device; its sigmoid is 0 for
    logits below -87 (float64: -708) and so are the value and its gradient there.

    Sources: unnormalised sigmoid weights are the FoMoE paper's (arXiv 2606.19025), and so is the
    router over the residents only (``resident``). Sigmoid with a bias in the selection only and
    groups by the sum of their two best is DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid,
    bias, 8 groups of which 4, "top2_sum", renormalize, scale 2.5. Groups by their best score are
    DeepSeek-V2 (arXiv 2405.04434, section 2.2.2). The softmax over the chosen is Mixtral's
    (arXiv 2401.04088, section 2.1) and gpt-oss'. The probabilities behind ``prob_sum``, the order
    of ties and NaN, and a bias on the logit instead of the probability for softmax and unit are our
    choice.

    Parameters
    ----------
    logits : Tensor, (T, E), float64 | float32 | bfloat16 | float16
        E up to 4096. Any strides; a non-contiguous input is copied. An eligible NaN or +inf logit,
        or eligible logits that all are -inf, make all softmax weights of their token NaN; with
        ``score_after_top_k`` only if the chosen logits are such.
    top_k : int
        1 <= top_k <= E; it may exceed the number of eligible experts.
    score : "softmax", "sigmoid" or "unit"
    score_after_top_k : bool
        Take the softmax of the weights over the chosen logits only, which is stable where those
        underflow in the softmax over all. Changes nothing for sigmoid and unit.
    bias : Tensor, (E,), accumulation dtype, optional
        Added to the score of selection only; never enters weights and gets no gradient.
    resident : Tensor, (E,), bool, optional
        The eligible experts. A token that may choose fewer than ``top_k`` gets id -1 and weight 0
        in its last slots; without any, z_sum is 0 too.
    num_groups : int
        Contiguous groups of E / num_groups experts, of which only the best ``top_k_groups`` of each
        token can be chosen from; 1 is no groups. A group without eligible experts is never taken.
    top_k_groups : int
        1 <= top_k_groups <= num_groups, with top_k <= top_k_groups * E / num_groups.
    group_score : "max" or "top2_sum"
        The best score in the group, or the sum of the two best (of the one in a group of one).
        Ordered as experts are.
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
    weights, prob_sum, z_sum, ids, counts = torch.ops.fomoe.topk_gate(
        logits,
        bias,
        resident,
        top_k,
        code_of("topk_gate", "score", score, GATE_SCORES),
        score_after_top_k,
        num_groups,
        top_k_groups,
        code_of("topk_gate", "group_score", group_score, GROUP_SCORES),
        renormalize,
        scale,
    )
    return GateOutput(ids, weights, counts, prob_sum, z_sum)


def _check_gate(op: str, logits: Tensor, resident: Tensor | None, top_k: int, score: int) -> None:
    check_code(op, "score", score, GATE_SCORES)
    check_tensor(op, "logits", logits, FLOATS, (None, None), "(T, E)")
    num_experts = logits.shape[1]
    check(
        num_experts <= MAX_EXPERTS,
        lambda: (
            f"fomoe::{op}: logits must have at most {MAX_EXPERTS} experts, "
            f"got shape {tuple(logits.shape)}"
        ),
    )
    check(
        top_k >= 1 and top_k <= num_experts,
        lambda: f"fomoe::{op}: top_k must be in [1, {num_experts}], got {top_k}",
    )
    if resident is not None:
        check_tensor(op, "resident", resident, (torch.bool,), (num_experts,), "(E,)")


def _check_groups(num_experts: int, top_k: int, num_groups: int, top_k_groups: int) -> None:
    op = "topk_gate"
    check(
        num_groups >= 1 and num_experts % num_groups == 0,
        lambda: f"fomoe::{op}: num_groups must divide the {num_experts} experts, got {num_groups}",
    )
    check(
        top_k_groups >= 1 and top_k_groups <= num_groups,
        lambda: f"fomoe::{op}: top_k_groups must be in [1, {num_groups}], got {top_k_groups}",
    )
    group_size = num_experts // num_groups
    check(
        top_k <= top_k_groups * group_size,
        lambda: (
            f"fomoe::{op}: top_k_groups must be at least {-(-top_k // group_size)} groups of "
            f"{group_size} experts for top_k = {top_k}, got {top_k_groups}"
        ),
    )


@torch.library.register_fake("fomoe::topk_gate")
def _fake(
    logits: Tensor,
    bias: Tensor | None,
    resident: Tensor | None,
    top_k: int,
    score: int,
    score_after_top_k: bool,
    num_groups: int,
    top_k_groups: int,
    group_score: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "topk_gate"
    check_devices(op, {"logits": logits, "bias": bias, "resident": resident})
    _check_gate(op, logits, resident, top_k, score)
    check_code(op, "group_score", group_score, GROUP_SCORES)
    num_tokens, num_experts = logits.shape
    _check_groups(num_experts, top_k, num_groups, top_k_groups)
    dtype = sum_dtype(logits.dtype)
    if bias is not None:
        check_tensor(op, "bias", bias, (dtype,), (num_experts,), "(E,)")
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
    resident: Tensor | None,
    ids: Tensor,
    score: int,
    score_after_top_k: bool,
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
    check_devices(op, {"logits": logits, "resident": resident, "ids": ids, **tensors})
    check_tensor(op, "ids", ids, INT32, (logits.shape[0], None), "(T, K)")
    _check_gate(op, logits, resident, ids.shape[1], score)
    for name, (gradient, shape, legend) in gradients.items():
        if gradient is not None:
            check_tensor(op, name, gradient, (sum_dtype(logits.dtype),), shape, legend)
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, resident, _, score, score_after_top_k, *_, renormalize, scale = inputs
    ctx.settings = score, score_after_top_k, renormalize, scale
    ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
    ids = output[3]
    ctx.save_for_backward(logits, resident, ids)


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
    return grad_logits, *[None] * 10


torch.library.register_autograd("fomoe::topk_gate", _backward, setup_context=_setup_context)
refuse_double_backward("topk_gate_backward")
