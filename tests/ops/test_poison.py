# SPDX-License-Identifier: Apache-2.0
"""Every element of every result is written, and nothing unwritten is read.

transformers and axolotl trained on rows past the last expert that no kernel had written (HF#48205,
axolotl#3827).
"""

import op_calls
import pytest
import torch
from op_calls import assert_same_bits, call_of, results_of
from samples import DTYPES, SAMPLE, SAMPLES, name_of

from fomoe.ops._names import ACTIVATIONS

CHECKED = [
    sample
    for sample in SAMPLES
    if sample.name
    in ("some ghosts", "no tokens", "a site without experts", "one expert gets everything")
]


@pytest.fixture
def poison():
    """Makes torch fill new memory with NaN, with 255 in bytes, and with the largest integers."""
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


def test_new_memory_is_poisoned(poison):
    poison()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(1).isnan().all()
    assert torch.zeros(1).new_empty(4, dtype=torch.uint8).view(torch.float32).isnan().all()
    assert torch.zeros(1).new_empty(1, dtype=torch.int32).item() == 2**31 - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sample", CHECKED, ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
def test_what_lies_in_new_memory_changes_no_result(name, sample, dtype, poison):
    call = call_of(name, sample, dtype)
    expected = results_of(*call)
    poison()
    actual = results_of(*call)
    assert all(result.isfinite().all() for result in actual)
    assert_same_bits(actual, expected)


def test_the_pre_activation_of_rows_past_the_last_is_zero(poison):
    _, tensors = call_of("expert_mlp swiglu", SAMPLE, torch.float32)
    poison()
    arguments = {"activation": ACTIVATIONS["swiglu"], "keep_pre_activation": True}
    _, kept = torch.ops.fomoe.expert_mlp(**tensors, **arguments)
    executed = int(tensors["offsets"][-1])
    assert 0 < executed < len(kept)
    assert kept[:executed].isfinite().all()
    assert not kept[executed:].any()
