# SPDX-License-Identifier: Apache-2.0
"""What the CUDA implementations refuse before they reach a kernel, called here without a GPU."""

import pytest
import torch
from op_calls import kernels
from test_fake import CALLS, OPS, TENSORS

import fomoe._C as _C

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def refusal_of(op, arguments):
    """The message of the CUDA implementation, whatever the device of the tensors."""
    overload = getattr(OPS, op).default
    values = [arguments[argument.name] for argument in overload._schema.arguments]
    with pytest.raises(RuntimeError) as raised:
        overload.redispatch(CUDA, *values)
    return str(raised.value)


def test_every_op_has_a_cuda_implementation():
    for name in kernels():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fomoe::{name}", "CUDA")


@pytest.mark.skipif(_C.compiled_with_cuda(), reason="this build has CUDA kernels")
@pytest.mark.parametrize("op", CALLS)
def test_a_build_without_cuda_kernels_says_so(op):
    message = refusal_of(op, CALLS[op])
    assert message.startswith(f"fomoe::{op}: this build of fomoe has no CUDA kernels; install it")


@pytest.mark.skipif(not _C.compiled_with_cuda(), reason="this build has no CUDA kernels")
@pytest.mark.parametrize("op", CALLS)
def test_tensors_of_the_cpu_never_reach_a_cuda_kernel(op):
    assert "must be on a CUDA device, got cpu" in refusal_of(op, CALLS[op])


@pytest.mark.parametrize(("op", "argument"), TENSORS)
def test_one_tensor_on_another_device_is_named(op, argument):
    message = refusal_of(op, CALLS[op] | {argument: CALLS[op][argument].to("meta")})
    assert message.startswith(f"fomoe::{op}: ")
    assert f"{argument} must be on the device of " in message or f" of {argument}, meta" in message
