# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, grouped heads and causality, by hand."""

import math

import pytest
import torch

from fomoe.models import RopeScaling
from fomoe.models.attention import Attention, rotate, rotation


def angles(length, head_dim, theta=10000.0, scaling=None):
    cpu = torch.device("cpu")
    return rotation(length, head_dim, theta, scaling=scaling, dtype=torch.float64, device=cpu)


def test_positions_turn_by_their_index_times_the_inverse_frequency():
    # head_dim 4, theta 100: inverse frequencies 1 and 1/10.
    cos, sin = angles(3, 4, theta=100.0)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(cos, expected.cos())
    torch.testing.assert_close(sin, expected.sin())


def test_linear_scaling_divides_every_angle():
    scaled = angles(9, 4, scaling=RopeScaling(kind="linear", factor=4.0))
    torch.testing.assert_close(scaled.cos[[0, 4, 8]], angles(3, 4).cos)


def test_llama3_scaling_divides_slow_frequencies_only():
    # head_dim 6, theta 1000: frequencies 1, 1/10 and 1/100; in 20 pi positions these make 10, 1 and
    # 1/10 turns. From 0.5 to 2 turns, 1 is a third of the way.
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_frequency_factor=0.5, high_frequency_factor=2.0,
        original_context=63,
    )  # fmt: skip
    sin = angles(2, 6, theta=1000.0, scaling=scaling).sin[1]
    third = (63 / (2 * math.pi) * 0.1 - 0.5) / 1.5
    expected = [1.0, (1 - third) * 0.1 / 8 + third * 0.1, 0.01 / 8]
    assert sin.arcsin().tolist() == pytest.approx(expected)
    assert third == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind: expected one of linear, llama3, got 'yarn'"),
        ({"kind": "linear", "factor": 0}, "factor: expected a finite number above 0, got 0"),
        ({"kind": "linear", "factor": 2.0, "original_context": 8}, "kind and factor alone"),
        ({"kind": "llama3", "factor": 2.0}, "low_frequency_factor: expected .* above 0, got 0.0"),
    ],
)
def test_a_scaling_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_halves_are_rotated_against_each_other():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)  # (S, N) = (2, 2)
    turned = rotate(x, angles(2, 2))
    c, s = math.cos(1), math.sin(1)
    expected = torch.tensor([[1.0, 2.0], [c - 2 * s, 2 * c + s]], dtype=torch.float64)
    torch.testing.assert_close(turned, expected)


def test_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rotate(v.expand(6, 8), angles(6, 8)) for v in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[0, 2], scores[3, 5])
    torch.testing.assert_close(scores[4, 1], scores[3, 0])
    assert not torch.allclose(scores[0, 1], scores[0, 2])


def test_rotation_of_bf16_is_computed_in_the_angles_dtype():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    turned = rotate(x, angles(4, 8))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.double(), angles(4, 8)).bfloat16())


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 1, 2, 5])
def test_attention_equals_a_loop_over_heads_and_positions(num_kv_heads, window):
    torch.manual_seed(0)
    attention = Attention(6, 4, num_kv_heads, head_dim=2, sliding_window=window).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    heads = []
    for head in range(4):
        shared = head // (4 // num_kv_heads)
        q, k, v = (
            layer(x[0])[:, 2 * index : 2 * index + 2]
            for layer, index in (
                (attention.query, head),
                (attention.key, shared),
                (attention.value, shared),
            )
        )
        q, k = rotate(q, angles(5, 2)), rotate(k, angles(5, 2))
        seen = [slice(max(0, t + 1 - (window or 5)), t + 1) for t in range(5)]
        rows = [(q[t] @ k[s].T / math.sqrt(2)).softmax(0) @ v[s] for t, s in enumerate(seen)]
        heads.append(torch.stack(rows))
    expected = attention.output(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(x, angles(5, 2))[0], expected)
