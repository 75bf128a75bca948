# SPDX-License-Identifier: Apache-2.0
"""The fake kernels, which are the meta kernels too, refuse what the CPU kernels refuse."""

import pytest
import torch
from samples import SAMPLE, gradient_like

from fomoe import ops

OPS = torch.ops.fomoe


def good_calls():
    """Arguments by name for every op."""
    dtype, names = torch.float32, ("slot_to_row", "row_to_slot", "offsets")
    routing = dict(zip(names, SAMPLE.routing(), strict=True))
    logits, x = SAMPLE.logits(dtype), SAMPLE.x(dtype)
    rows, weights = SAMPLE.rows(dtype, SAMPLE.dim), SAMPLE.weights(dtype)
    w1, w2, offsets = SAMPLE.w1(dtype), SAMPLE.w2(dtype), routing["offsets"]
    gate = ops.topk_gate(logits, 3, resident=SAMPLE.expert_map() >= 0)
    gradients = {
        "grad_weights": gradient_like(gate.weights),
        "grad_prob_sum": gradient_like(gate.prob_sum),
        "grad_z_sum": gradient_like(gate.z_sum),
    }
    resident = SAMPLE.expert_map() >= 0
    bias = SAMPLE.random(SAMPLE.experts, seed=7, dtype=dtype)
    settings = {"score": 1, "score_after_top_k": False, "renormalize": False, "scale": 1.0}
    groups = {"num_groups": 1, "top_k_groups": 1, "group_score": 0}
    biases = {"b1": SAMPLE.b1(dtype), "b2": SAMPLE.b2(dtype)}
    layer = {"x": x, "weights": weights, "w1": w1, "w2": w2} | biases | routing | {"activation": 0}
    forward = layer | {"keep_pre_activation": True}
    backward = layer | {"needs_x": True, "needs_experts": True}
    pre_activation = OPS.expert_mlp(**forward)[1]
    return {
        "topk_gate": (
            {"logits": logits, "bias": bias, "resident": resident, "top_k": 3} | settings | groups
        ),
        "topk_gate_backward": (
            gradients | {"logits": logits, "resident": resident, "ids": gate.ids} | settings
        ),
        "route": {
            "ids": SAMPLE.ids(),
            "expert_map": SAMPLE.expert_map(),
            "num_local_experts": 3,
            "capacity": 2,
        },
        "destinations": {
            "ids": SAMPLE.ids(),
            "group_of_expert": SAMPLE.expert_map(),
            "num_groups": 3,
        },
        "permute": {"x": x} | routing,
        "combine": {"rows": rows, "weights": weights} | routing,
        "combine_backward": {"grad_y": x, "rows": rows, "weights": weights} | routing,
        "grouped_gemm": {"rows": rows, "weight": w1, "offsets": offsets, "transpose_weight": False},
        "grouped_gemm_wgrad": {"left": rows, "right": rows, "offsets": offsets},
        "expert_mlp": forward,
        "expert_mlp_backward": {"grad_y": x, "pre_activation": pre_activation} | backward,
    }


CALLS = good_calls()
TENSORS = [
    (op, name)
    for op, arguments in CALLS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


def on_meta(arguments):
    return {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def refusal(op, arguments):
    with pytest.raises(RuntimeError, match=f"fomoe::{op}: .* must ") as raised:
        getattr(OPS, op)(**arguments)
    return str(raised.value)


@pytest.mark.parametrize("op", CALLS)
def test_meta_results_look_like_the_real_ones(op):
    real, fake = getattr(OPS, op)(**CALLS[op]), getattr(OPS, op)(**on_meta(CALLS[op]))
    pairs = [(real, fake)] if isinstance(real, torch.Tensor) else zip(real, fake, strict=True)
    for actual, expected in pairs:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert expected.device.type == "meta"


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_a_tensor_with_an_axis_too_many_is_refused_on_both_devices(op, argument):
    arguments = CALLS[op] | {argument: CALLS[op][argument].unsqueeze(0)}
    refusal(op, arguments)
    refusal(op, on_meta(arguments))


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_another_dtype_is_refused_on_both_devices(op, argument):
    arguments = CALLS[op] | {argument: CALLS[op][argument].to(torch.int16)}
    assert "int16" in refusal(op, on_meta(arguments))
    refusal(op, arguments)


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_one_tensor_on_another_device_is_refused(op, argument):
    arguments = CALLS[op] | {argument: CALLS[op][argument].to("meta")}
    assert "must be on the device of" in refusal(op, arguments)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("topk_gate", {"top_k": 8}, r"top_k must be in \[1, 7\], got 8"),
        ("topk_gate", {"num_groups": 2}, "num_groups must divide the 7 experts, got 2"),
        ("topk_gate", {"num_groups": 0}, "num_groups must divide the 7 experts, got 0"),
        ("topk_gate", {"top_k_groups": 2}, r"top_k_groups must be in \[1, 1\], got 2"),
        (
            "topk_gate",
            {"num_groups": 7, "top_k_groups": 2},
            "top_k_groups must be at least 3 groups of 1 experts for top_k = 3, got 2",
        ),
        (
            "topk_gate",
            {"bias": torch.zeros(6)},
            r"bias must have shape \(E,\) = \(7\), got",
        ),
        ("topk_gate", {"bias": torch.zeros(7, dtype=torch.float64)}, "bias must be float32, got"),
        ("topk_gate", {"resident": torch.zeros(7)}, "resident must be bool, got float32"),
        ("route", {"num_local_experts": -1}, "num_local_experts must be at least 0, got -1"),
        ("route", {"capacity": -1}, "capacity must be at least 0, got -1"),
        ("destinations", {"num_groups": -1}, "num_groups must be at least 0, got -1"),
        ("permute", {"x": torch.zeros(3, 2)}, r"x must have shape \(T, D\) = \(13, any\)"),
        ("expert_mlp", {"activation": 1}, r"w1 must have shape \(E_local, F, D\) = \(3, 11, 17\)"),
    ],
)
def test_sizes_and_settings_that_do_not_fit_get_the_message_of_the_cpu(op, change, message):
    for arguments in (CALLS[op] | change, on_meta(CALLS[op] | change)):
        with pytest.raises(RuntimeError, match=f"fomoe::{op}: {message}"):
            getattr(OPS, op)(**arguments)


@pytest.mark.parametrize(
    ("op", "argument", "code", "message"),
    [
        ("topk_gate", "score", 3, r"0 \(softmax\), 1 \(sigmoid\) or 2 \(unit\), got 3"),
        ("topk_gate_backward", "score", -1, r"0 \(softmax\), 1 \(sigmoid\) or 2 \(unit\), got -1"),
        ("topk_gate", "group_score", 2, r"0 \(max\) or 1 \(top2_sum\), got 2"),
        ("expert_mlp", "activation", 3, r"0 \(swiglu\), 1 \(silu\) or 2 \(swiglu_clamped\), got 3"),
        ("expert_mlp_backward", "activation", -1, r"0 \(swiglu\), 1 .*, got -1"),
    ],
)
def test_unknown_codes_of_choices_are_refused_on_both_devices(op, argument, code, message):
    for arguments in (CALLS[op] | {argument: code}, on_meta(CALLS[op] | {argument: code})):
        with pytest.raises(RuntimeError, match=f"fomoe::{op}: {argument} must be {message}"):
            getattr(OPS, op)(**arguments)


def test_experts_without_a_width_are_refused_on_both_devices():
    arguments = CALLS["expert_mlp"] | {"w1": torch.zeros(3, 0, 17), "w2": torch.zeros(3, 17, 0)}
    arguments |= {"b1": None, "b2": None}
    for call in (arguments, on_meta(arguments)):
        with pytest.raises(RuntimeError, match="expert_mlp: D and F must be at least 1, got w2"):
            OPS.expert_mlp(**call)
