# SPDX-License-Identifier: Apache-2.0
"""Results and gradients of every op against the reference in plain torch, and the op of the CPU."""

import op_calls
import pytest
import torch
from on_device import CASES, EVEN, ON_BOTH, needs_cuda, results_on
from op_calls import assert_same_bits, call_of
from samples import DTYPES, SAMPLES, Sample, assert_close, name_of

from fomoe import reference

# One rounding, or none: the CPU's bits. The gate's sums run in an order of their own.
EXACT = ["route", "destinations", "permute", "combine without weights"]

# More tiles in every product than a GPU has multiprocessors: blocks take one after the other.
MANY_TILES = Sample(name="many tiles", tokens=3000, experts=12, top_k=4, dim=520, expert_dim=392)


def assert_equal_or_close(actual, expected, name, dtype):
    # expert_mlp rounds the pre-activation, the hidden rows and the outputs to a 16-bit type.
    scale = 4 if dtype.itemsize == 2 else 1
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a = a.cpu()
        if e.is_floating_point():
            # What the gate gives in float32 was never rounded to the dtype of the logits.
            assert_close(a, e, a.dtype if name.startswith("topk_gate") else dtype, scale)
        else:
            assert torch.equal(a, e), f"{name}: result {index} differs"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
@pytest.mark.parametrize(("device", "sample"), CASES)
def test_results_and_gradients_equal_the_reference_and_the_cpu(
    device, sample, name, dtype, monkeypatch
):
    actual = results_on(device, call_of(name, sample, dtype))
    on_cpu = results_on("cpu", call_of(name, sample, dtype))
    if name in EXACT:
        assert_same_bits([tensor.cpu() for tensor in actual], on_cpu)
    assert_equal_or_close(actual, on_cpu, name, dtype)
    monkeypatch.setattr(op_calls, "ops", reference)
    assert_equal_or_close(actual, results_on("cpu", call_of(name, sample, dtype)), name, dtype)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", op_calls.WITH_PRODUCTS)
def test_many_tiles_equal_the_reference(name, dtype, monkeypatch):
    actual = results_on("cuda", call_of(name, MANY_TILES, dtype))
    monkeypatch.setattr(op_calls, "ops", reference)
    expected = results_on("cuda", call_of(name, MANY_TILES, dtype))
    assert_equal_or_close(actual, [tensor.cpu() for tensor in expected], name, dtype)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "unit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (128, 8), (256, 8), (384, 40)])
@needs_cuda
def test_the_gate_chooses_the_experts_that_the_cpu_chooses(experts, top_k, dtype, score):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(2000, experts, generator=generator)
    logits = (logits * 8).round() / 8  # many ties
    logits[::7, ::5] = float("nan")
    logits[3::11] = float("-inf")
    logits = logits.to(dtype)
    gate = {"top_k": top_k, "score": score, "renormalize": True}
    expected = op_calls.ops.topk_gate(logits, **gate)
    actual = op_calls.ops.topk_gate(logits.cuda(), **gate)
    assert torch.equal(actual.ids.cpu(), expected.ids)
    assert torch.equal(actual.counts.cpu(), expected.counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", [SAMPLES[0], EVEN], ids=name_of)
@pytest.mark.parametrize("device", ON_BOTH)
def test_rows_past_the_end_are_never_read(device, sample, dtype):
    rows = sample.rows(dtype, sample.dim)
    offsets, weight = sample.routing().offsets, sample.w1(dtype)
    end = int(offsets[-1])
    assert end < rows.shape[0]
    expected = op_calls.ops.grouped_gemm(rows, weight, offsets)
    rows[end:] = float("nan")
    arguments = [tensor.to(device) for tensor in (rows, weight, offsets)]
    actual = op_calls.ops.grouped_gemm(*arguments).cpu()
    assert_close(actual, expected, dtype)
    assert not actual[end:].any()
