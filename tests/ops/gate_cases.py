# SPDX-License-Identifier: Apache-2.0
"""Settings of the gate that its tests share, and the comparison with the reference."""

import torch
from samples import assert_close, gradient_like, leaf, sum_dtype

from fomoe import ops, reference

SCORES = ["softmax", "sigmoid", "unit"]
SETTINGS = [
    {"score": score, "score_after_top_k": after, "renormalize": renormalize, "scale": 2.5}
    for score in SCORES
    for after in (False, True)
    for renormalize in (False, True)
]
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "resident": {"resident": True},
    "best groups": {"num_groups": 5, "top_k_groups": 3},
    "groups by sum": {"num_groups": 5, "top_k_groups": 3, "group_score": "top2_sum"},
    "everything": {
        "bias": True,
        "resident": True,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "top2_sum",
    },
}


def settings_name(settings):
    return "-".join(str(value) for value in settings.values())


def tensors_for(options, experts, dtype, seed=7):
    """The options with tensors instead of True; some 60% of the experts are resident."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(experts, generator=generator, dtype=torch.float64)
    resident = torch.rand(experts, generator=generator) < 0.6
    tensors = {"bias": bias.to(sum_dtype(dtype)), "resident": resident}
    return options | {name: tensors[name] for name in options if name in tensors}


def result_and_gradient(topk_gate, logits, top_k, settings):
    logits = leaf(logits)
    gate = topk_gate(logits, top_k, **settings)
    outputs = (gate.weights, gate.prob_sum, gate.z_sum)
    torch.autograd.backward(outputs, [gradient_like(output) for output in outputs])
    return gate, logits.grad


def assert_equals_the_reference(logits, top_k, settings):
    dtype = logits.dtype
    actual, d_logits = result_and_gradient(ops.topk_gate, logits, top_k, settings)
    expected, d_logits_expected = result_and_gradient(reference.topk_gate, logits, top_k, settings)
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.counts, expected.counts)
    for name in ("weights", "prob_sum", "z_sum"):
        assert_close(getattr(actual, name), getattr(expected, name), sum_dtype(dtype))
    assert_close(d_logits, d_logits_expected, dtype)
