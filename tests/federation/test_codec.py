# SPDX-License-Identifier: Apache-2.0
"""What codecs write, by hand, and what error feedback makes of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fomoe.errors import UserError
from fomoe.federation.exchange import codec_for

LOSSY = ("bf16", "int8", "int4")


def through(name, *values):
    """What arrives, and how many bytes travelled."""
    codec = codec_for(name, torch.float32)
    decoded, num_bytes = [], 0
    for value in values:
        aligned = F.pad(value, (0, -value.numel() % codec.alignment))
        payload = torch.empty(codec.num_bytes(value.numel()), dtype=torch.uint8)
        codec.encode(aligned.clone(), payload)
        decoded.append(codec.decode(payload, aligned)[: value.numel()])
        num_bytes += payload.numel()
    return decoded, num_bytes


def test_four_bits_are_sevenths_of_the_largest():
    (decoded,), num_bytes = through("int4", torch.tensor([7.0, -3.4, 0.5, 1.5, 0.0]))
    assert decoded.tolist() == [7.0, -3.0, 0.0, 2.0, 0.0]  # half goes to even
    assert num_bytes == 4 + 64, "one scale and a whole block of half bytes"


def test_eight_bits_are_127ths_of_the_largest():
    (decoded,), num_bytes = through("int8", torch.tensor([-254.0, 3.0, 1.1, 0.9]))
    assert decoded.tolist() == [-254.0, 4.0, 2.0, 0.0]
    assert num_bytes == 4 + 128


def test_every_block_of_128_has_its_own_scale():
    value = torch.cat([torch.full((128,), 1e-3), torch.full((2,), 7e3)])
    (decoded,), num_bytes = through("int4", value)
    assert torch.allclose(decoded, value, rtol=1e-6)
    assert num_bytes == 2 * (4 + 64)


def test_bf16_rounds_to_the_nearest_even():
    (decoded,), num_bytes = through("bf16", torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.1]))
    assert decoded.tolist() == [1.0, 1 + 2**-6, -0.10009765625]
    assert num_bytes == 6


def test_fp32_and_fp64_travel_as_they_are():
    (decoded,), num_bytes = through("fp32", torch.tensor([0.1, float("inf")]))
    assert decoded.tolist() == torch.tensor([0.1, float("inf")]).tolist()
    assert num_bytes == 8
    assert codec_for("fp32", torch.float64).num_bytes(3) == 24


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_and_numbers_too_small_for_a_scale_become_zeros(name):
    (decoded, empty), _ = through(name, torch.tensor([0.0, 1e-45]), torch.empty(0))
    assert decoded.abs().max() <= 1e-45
    assert empty.numel() == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_codec_refuses_other_parameters_than_float32(name):
    with pytest.raises(UserError, match=rf"federation.codec = '{name}' .* model's are float64"):
        codec_for(name, torch.float64)


@given(
    name=st.sampled_from(LOSSY),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_the_error_is_at_most_half_a_step_and_encoding_again_changes_nothing(
    name, sizes, exponent, seed
):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=generator) * 2.0**exponent for size in sizes]
    decoded, _ = through(name, *values)
    again, _ = through(name, *decoded)
    for value, once, twice in zip(values, decoded, again, strict=True):
        if value.numel():
            steps = {"bf16": 2 * 128, "int8": 2 * 127, "int4": 2 * 7}[name]
            assert (value - once).abs().max() <= value.abs().max() / steps * 1.001
            assert torch.allclose(once, twice, rtol=1e-6, atol=0)
