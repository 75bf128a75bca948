# SPDX-License-Identifier: Apache-2.0
"""Any strides and any alignment, for every op and every tensor of it.

torch's grouped product wants strides in multiples of 16 bytes, also on the CPU (pytorch#172440),
and transformers handed it strides that it did not support (HF#48644). The sample's widths, 17 and
11, are odd.
"""

import math

import op_calls
import pytest
import torch
from op_calls import assert_same_bits, call_of, results_of
from samples import SAMPLE, assert_close, name_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def poisoned(shape, dtype):
    """Full of what no op may read: NaN, or an index far outside."""
    return torch.full(shape, math.nan if dtype.is_floating_point else 1 << 20).to(dtype)


def shifted_by_one_element(tensor):
    memory = poisoned((tensor.numel() + 1,), tensor.dtype)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


def every_second_element(tensor):
    view = poisoned((*tensor.shape[:-1], 2 * tensor.shape[-1]), tensor.dtype)[..., 1::2]
    return view.copy_(tensor)


def window_of_a_larger_tensor(tensor):
    view = poisoned([size + 3 for size in tensor.shape], tensor.dtype)
    for axis, size in enumerate(tensor.shape):
        view = view.narrow(axis, 1, size)
    return view.copy_(tensor)


def transposed_memory(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else every_second_element(tensor)


LAYOUTS = [
    shifted_by_one_element,
    every_second_element,
    window_of_a_larger_tensor,
    transposed_memory,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
def test_the_layout_of_the_tensors_changes_no_result(name, dtype, layout):
    function, tensors = call_of(name, SAMPLE, dtype)
    expected = results_of(function, {key: t.contiguous() for key, t in tensors.items()})
    actual = results_of(function, {key: layout(t) for key, t in tensors.items()})
    if name in op_calls.WITHOUT_PRODUCTS:
        return assert_same_bits(actual, expected)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, dtype, scale=4 if dtype.itemsize == 2 else 1)


def test_experts_that_share_one_matrix_may_be_an_expanded_tensor():
    function, tensors = call_of("expert_mlp swiglu", SAMPLE, torch.float32)
    for name in ("w1", "w2", "b1", "b2"):
        tensors[name] = tensors[name][:1].expand_as(tensors[name])
    expected = results_of(function, {key: t.contiguous() for key, t in tensors.items()})
    assert_same_bits(results_of(function, tensors), expected)
