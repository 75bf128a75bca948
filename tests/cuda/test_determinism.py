# SPDX-License-Identifier: Apache-2.0
"""Same bits from run to run, alone and beside other streams."""

import contextlib

import op_calls
import pytest
import torch
from on_device import ON_BOTH, moved, needs_cuda, results_on
from op_calls import assert_same_bits, call_of
from samples import DTYPES, Sample, name_of

LARGE = Sample(
    name="large",
    tokens=1000,
    experts=12,
    top_k=4,
    dim=192,
    expert_dim=96,
    residents=tuple(range(9)),
)
SHORT = Sample(name="short", tokens=300, experts=12, top_k=4, dim=64, expert_dim=96)


def streams(device, count):
    if device == "cpu":
        return [contextlib.nullcontext() for _ in range(count)]
    return [torch.cuda.stream(torch.cuda.Stream()) for _ in range(count)]


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
@pytest.mark.parametrize("device", ON_BOTH)
def test_two_runs_give_the_same_bits(device, name, dtype):
    call = call_of(name, LARGE, dtype)
    assert_same_bits(results_on(device, call), results_on(device, call))


@pytest.mark.parametrize("name", op_calls.ALL)
@pytest.mark.parametrize("device", ON_BOTH)
def test_two_streams_do_not_disturb_each_other(device, name):
    calls = [call_of(name, sample, torch.bfloat16) for sample in (LARGE, SHORT)]
    calls = [(function, moved(tensors, device)) for function, tensors in calls]
    expected = [results_on(device, call) for call in calls]
    synchronize(device)
    contexts, results = streams(device, 2), [[], []]
    for _ in range(10):
        for context, call, result in zip(contexts, calls, results, strict=True):
            with context:
                result.append(results_on(device, call))
    synchronize(device)
    for runs, wanted in zip(results, expected, strict=True):
        for run in runs:
            assert_same_bits(run, wanted)


@needs_cuda
@pytest.mark.parametrize("name", op_calls.DIFFERENTIABLE)
def test_an_op_waits_for_what_its_stream_did_before(name):
    function, tensors = call_of(name, SHORT, torch.bfloat16)
    tensors = {key: tensor.cuda() for key, tensor in tensors.items()}
    key = next(iter(tensors))  # the op's main input arrives late, on a stream of its own
    expected = function(**tensors)
    late = torch.zeros_like(tensors[key])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # cycles
        late.copy_(tensors[key])
        actual = function(**tensors | {key: late})
    torch.cuda.synchronize()
    both = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (actual, expected))
    assert_same_bits(*both)
