# SPDX-License-Identifier: Apache-2.0
"""What the ops keep, and what their backward allocates beyond the gradients."""

import ctypes
import gc
import platform

import pytest
import torch
from op_calls import kernels
from samples import Sample, leaf
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe import ops

SAMPLE = Sample(name="tiny", tokens=3, experts=4, top_k=2, dim=4, expert_dim=2, residents=(1, 3))
IDS, EXPERT_MAP, ROUTING = SAMPLE.ids(), SAMPLE.expert_map(), SAMPLE.routing()
BIAS, RESIDENT = torch.zeros(4), EXPERT_MAP >= 0
DTYPE = torch.float32

STEPS = {
    "topk_gate": (
        lambda logits: ops.topk_gate(logits, 2, score="sigmoid").weights,
        [SAMPLE.logits(DTYPE)],
    ),
    "topk_gate with a bias and a mask": (
        lambda logits: ops.topk_gate(logits, 2, bias=BIAS, resident=RESIDENT).weights,
        [SAMPLE.logits(DTYPE)],
    ),
    "route": (lambda: ops.route(IDS, EXPERT_MAP, 2).offsets, []),
    "route with a capacity": (lambda: ops.route(IDS, EXPERT_MAP, 2, capacity=1).offsets, []),
    "permute": (lambda x: ops.permute(x, ROUTING), [SAMPLE.x(DTYPE)]),
    "combine": (
        lambda rows, weights: ops.combine(rows, weights, ROUTING),
        [SAMPLE.rows(DTYPE, 4), SAMPLE.weights(DTYPE)],
    ),
    "grouped_gemm": (
        lambda rows, weight: ops.grouped_gemm(rows, weight, ROUTING.offsets),
        [SAMPLE.rows(DTYPE, 4), SAMPLE.w1(DTYPE)],
    ),
    "expert_mlp": (
        lambda x, weights, w1, w2: ops.expert_mlp(x, weights, w1, w2, ROUTING),
        [SAMPLE.x(DTYPE), SAMPLE.weights(DTYPE), SAMPLE.w1(DTYPE), SAMPLE.w2(DTYPE)],
    ),
}


def schemas_of_all_ops():
    return [getattr(torch.ops.fomoe, name).default._schema for name in kernels()]


def test_no_schema_has_a_str():
    # torch's stable ABI never frees the string that it makes of a str argument.
    assert len(schemas_of_all_ops()) == 11
    for schema in schemas_of_all_ops():
        types = [str(value.type) for value in [*schema.arguments, *schema.returns]]
        assert not any("str" in name for name in types), schema


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; uordblks is the number of bytes in use."""

    _fields_ = [(f"field_{index}", ctypes.c_size_t) for index in range(7)] + [
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


def bytes_in_use():
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    return mallinfo2().uordblks


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("op", STEPS)
def test_calls_leave_no_memory_behind(op):
    function, inputs = STEPS[op]
    inputs = [leaf(tensor) for tensor in inputs]

    def run(calls):
        for _ in range(calls):
            out = function(*inputs)
            if inputs:
                torch.autograd.grad(out, inputs, torch.ones_like(out))

    run(100)
    before, calls = bytes_in_use(), 500
    run(calls)
    assert bytes_in_use() - before < 8 * calls


class CalledOps(TorchDispatchMode):
    """Records the names of all ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [op for op in STEPS if not op.startswith("route")])
def test_the_backward_is_one_op_per_gradient_and_fills_no_zeros(op):
    function, inputs = STEPS[op]
    inputs = [leaf(tensor) for tensor in inputs]
    out = function(*inputs)
    gradient = torch.ones_like(out)
    with CalledOps() as called:
        torch.autograd.grad(out, inputs, gradient)
    computed = [name for name in called.names if name != "aten.detach.default"]
    assert computed
    assert all(name.startswith("fomoe.") for name in computed), computed
