# SPDX-License-Identifier: Apache-2.0
"""Layouts, sizes and mistakes in the arguments of ops on the device."""

import op_calls
import pytest
import torch
from on_device import EVEN, ON_BOTH, moved, needs_cuda, results_on
from op_calls import assert_same_bits, call_of
from samples import assert_close, leaf, name_of
from test_fake import CALLS, OPS, TENSORS
from test_layouts import LAYOUTS

from fomoe import explain_dispatch, ops
from fomoe.ops import Routing


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
@pytest.mark.parametrize("device", ON_BOTH)
def test_the_layout_of_the_tensors_changes_no_result(device, name, dtype, layout):
    # Widths for tensor cores: a tensor shifted by an element has to take the simple kernels.
    function, tensors = call_of(name, EVEN, dtype)
    expected = results_on(device, (function, tensors))

    def in_this_layout(**moved_tensors):
        # The layouts are made on the device: moving a view would make it dense.
        return function(**{key: laid_out(layout, t) for key, t in moved_tensors.items()})

    actual = results_on(device, (in_this_layout, tensors))
    if name in op_calls.WITHOUT_PRODUCTS:
        return assert_same_bits(actual, expected)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, dtype, scale=4 if dtype.itemsize == 2 else 1)


def laid_out(layout, tensor):
    """A differentiable copy with the strides and alignment of the layout."""

    class LayOut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            with torch.device(given.device):  # where the layout takes its memory
                return layout(given)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return LayOut.apply(tensor)


@pytest.mark.parametrize("device", ON_BOTH)
def test_experts_that_share_one_matrix_may_be_an_expanded_tensor(device):
    function, tensors = call_of("expert_mlp swiglu", EVEN, torch.bfloat16)
    tensors = moved(tensors, device)
    names = ("w1", "w2", "b1", "b2")
    shared = {name: tensors[name][:1].expand_as(tensors[name]) for name in names}
    expected = function(**tensors | {name: t.contiguous() for name, t in shared.items()})
    assert_same_bits([function(**tensors | shared)], [expected])


@pytest.mark.parametrize("name", op_calls.DIFFERENTIABLE)
@pytest.mark.parametrize("device", ON_BOTH)
def test_an_expanded_gradient_is_accepted(device, name):
    function, tensors = call_of(name, EVEN, torch.bfloat16)
    gradients = []
    for reduce in (torch.sum, lambda output: (output * torch.ones_like(output)).sum()):
        leaves = {
            key: leaf(tensor.to(device)) if tensor.is_floating_point() else tensor.to(device)
            for key, tensor in tensors.items()
        }
        outputs = function(**leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        sum(reduce(output) for output in outputs if output.requires_grad).backward()
        gradients.append([t.grad for t in leaves.values() if t.grad is not None])
    assert_same_bits(*gradients)


@needs_cuda
@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_one_tensor_on_another_device_is_named(op, argument):
    arguments = {
        name: value.cuda() if isinstance(value, torch.Tensor) and name != argument else value
        for name, value in CALLS[op].items()
    }
    tensors = [value for value in CALLS[op].values() if isinstance(value, torch.Tensor)]
    if len(tensors) == 1:
        return
    with pytest.raises(RuntimeError, match=f"fomoe::{op}: .* must be on the device of "):
        getattr(OPS, op)(**arguments)


@pytest.mark.parametrize(("op", "argument"), TENSORS)
@pytest.mark.parametrize("device", ON_BOTH)
def test_another_dtype_is_refused(device, op, argument):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in CALLS[op].items()
    }
    arguments[argument] = arguments[argument].to(torch.int16)
    with pytest.raises(RuntimeError, match=f"fomoe::{op}: .* must be "):
        getattr(OPS, op)(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": lambda t: t.float()}, "w1 must be bfloat16, got float32"),
        ({"w2": lambda t: t[1:]}, r"w2 must have shape \(E_local, D, F\) = \(3, 64, any\)"),
        ({"weights": lambda t: t[:, 1:]}, r"weights must have shape \(T, K\) = \(40, 3\)"),
    ],
)
@pytest.mark.parametrize("device", ON_BOTH)
def test_arguments_that_do_not_fit_are_named(device, change, message):
    function, tensors = call_of("expert_mlp swiglu", EVEN, torch.bfloat16)
    tensors = moved(tensors, device)
    tensors |= {name: apply(tensors[name]) for name, apply in change.items()}
    with pytest.raises(RuntimeError, match=f"fomoe::expert_mlp: {message}"):
        function(**tensors)


@pytest.mark.parametrize("device", ON_BOTH)
def test_more_experts_per_token_than_experts_are_refused(device):
    logits = EVEN.logits(torch.float32).to(device)
    with pytest.raises(RuntimeError, match=r"topk_gate: top_k must be in \[1, 7\], got 8"):
        ops.topk_gate(logits, 8)


@needs_cuda
def test_wrong_tables_never_lead_outside_an_array():
    # The device's tables are not read by the host: wrong ones give wrong values, and no more.
    x = EVEN.x(torch.bfloat16).cuda()
    tables = [table.cuda() for table in EVEN.routing()]
    for wild in (1 << 30, -(1 << 30)):
        routing = Routing(*(torch.full_like(table, wild) for table in tables))
        ops.combine(ops.permute(x, routing), None, routing)
        w1, w2 = EVEN.w1(torch.bfloat16).cuda(), EVEN.w2(torch.bfloat16).cuda()
        ops.expert_mlp(x, EVEN.weights(torch.bfloat16).cuda(), w1, w2, routing)
        ops.route(torch.full_like(tables[0], wild), torch.full_like(tables[2], wild), 3)
    torch.cuda.synchronize()


@needs_cuda
def test_the_kernels_are_those_that_explain_dispatch_names():
    from torch.profiler import ProfilerActivity, profile

    for dtype in (torch.float32, torch.bfloat16):
        function, tensors = call_of("grouped_gemm", EVEN, dtype)
        tensors = moved(tensors, "cuda")
        path = explain_dispatch("grouped_gemm", **tensors).kernels
        function(**tensors)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            function(**tensors)
            torch.cuda.synchronize()
        names = {event.key for event in recorded.key_averages()}
        assert any(f"cuda::{path}::" in name for name in names), (path, names)


@needs_cuda
def test_arrays_of_more_than_2_to_the_31_elements():
    tokens, top_k, dim, experts = 33_000, 8, 8192, 16
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("less than 30 GiB of GPU memory are free")
    ids = (
        torch.arange(tokens * top_k, device="cuda", dtype=torch.int32).view(tokens, top_k) % experts
    )
    routing = ops.route(ids, torch.arange(experts, device="cuda", dtype=torch.int32), experts)
    x = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16)
    rows = ops.permute(x, routing)
    assert rows.numel() > 1 << 31
    for part in (slice(0, 5), slice(tokens * top_k - 5, None)):
        assert torch.equal(rows[part], x[routing.row_to_slot[part] // top_k])
    assert torch.equal(ops.combine(rows, None, routing), (x.float() * top_k).bfloat16())


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("name", op_calls.ALL)
def test_ops_run_where_their_tensors_are(name):
    call = call_of(name, EVEN, torch.bfloat16)
    expected = results_on("cuda:0", call)
    actual = results_on("cuda:1", call)
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.cpu() for t in actual], [t.cpu() for t in expected])
