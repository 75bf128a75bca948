# SPDX-License-Identifier: Apache-2.0
"""Same bits from run to run, and, without matrix products, for any number of threads."""

import op_calls
import pytest
import torch
from op_calls import assert_same_bits, call_of, results_of
from samples import DTYPES, Sample, name_of

# Large enough for every op to split its work; products, which synchronise the threads for every
# expert, with few experts.
MANY_EXPERTS = Sample(
    name="many experts", tokens=1100, experts=144, top_k=4, dim=96, residents=tuple(range(80))
)
FEW_EXPERTS = Sample(
    name="few experts", tokens=1000, experts=3, top_k=2, dim=96, expert_dim=48, residents=(0, 2)
)


def large_call(name, dtype):
    sample = MANY_EXPERTS if name in op_calls.WITHOUT_PRODUCTS else FEW_EXPERTS
    return call_of(name, sample, dtype)


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", [*op_calls.WITHOUT_PRODUCTS, "grouped_gemm", "expert_mlp swiglu"])
def test_two_runs_give_the_same_bits(name, dtype, num_threads, with_threads):
    with_threads(num_threads)
    call = large_call(name, dtype)
    assert_same_bits(results_of(*call), results_of(*call))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", op_calls.WITHOUT_PRODUCTS)
def test_the_number_of_threads_does_not_change_a_bit(name, dtype, with_threads):
    call = large_call(name, dtype)
    with_threads(1)
    expected = results_of(*call)
    for num_threads in (2, 8):
        with_threads(num_threads)
        assert_same_bits(results_of(*call), expected)
