# SPDX-License-Identifier: Apache-2.0
"""The fused layer's specification against a hand-worked expert and a loop over slots."""

import math

import pytest
import torch
from torch import Tensor

from fomoe.reference import expert_mlp, route

EXPERT_MAP = torch.tensor([0, -1, 1], dtype=torch.int32)  # expert 1 of 3 is a ghost
IDS = torch.tensor([[2, 0], [1, 2], [0, 1], [0, 2]], dtype=torch.int32)


def sample(activation: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    num_rows = 6 if activation == "swiglu" else 3
    wide = torch.promote_types(dtype, torch.float32)
    x, w1, w2 = torch.randn(4, 2), torch.randn(2, num_rows, 2), torch.randn(2, 2, 3)
    return x.to(dtype), torch.rand(4, 2).to(wide), w1.to(dtype), w2.to(dtype)


def test_a_hand_worked_swiglu_expert():
    # gate = 2x, up = 3x, out = 5 h, weight 1/2; silu(g) = g / (1 + e^-g).
    routing = route(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)
    w1, w2 = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0]]])
    y = expert_mlp(torch.tensor([[0.5]]), torch.tensor([[0.5]]), w1, w2, routing)
    assert y.item() == pytest.approx(0.5 * 5.0 * (1.0 / (1 + math.exp(-1.0))) * 1.5)


def test_a_hand_worked_silu_expert():
    routing = route(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 1)
    w1, w2 = torch.tensor([[[2.0]]]), torch.tensor([[[5.0]]])
    y = expert_mlp(torch.tensor([[0.5]]), torch.tensor([[0.5]]), w1, w2, routing, "silu")
    assert y.item() == pytest.approx(0.5 * 5.0 * (1.0 / (1 + math.exp(-1.0))))


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_tokens_equal_a_loop_over_their_resident_choices(activation):
    x, weights, w1, w2 = sample(activation)
    y = expert_mlp(x, weights, w1, w2, route(IDS, EXPERT_MAP, 2), activation)

    expected = torch.zeros_like(x)
    for t in range(4):
        for k in range(2):
            expert = int(EXPERT_MAP[IDS[t, k]])
            if expert < 0:
                continue
            hidden = w1[expert] @ x[t]
            if activation == "swiglu":
                hidden = hidden[:3] * hidden[:3].sigmoid() * hidden[3:]
            else:
                hidden = hidden * hidden.sigmoid()
            expected[t] += weights[t, k] * (w2[expert] @ hidden)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_gradients_match_finite_differences(activation):
    inputs = [tensor.requires_grad_() for tensor in sample(activation)]
    routing = route(IDS, EXPERT_MAP, 2)
    assert torch.autograd.gradcheck(lambda *args: expert_mlp(*args, routing, activation), inputs)


def test_bf16_stays_near_float32():
    x, weights, w1, w2 = sample("swiglu", torch.bfloat16)
    routing = route(IDS, EXPERT_MAP, 2)
    y = expert_mlp(x, weights, w1, w2, routing)
    exact = expert_mlp(x.float(), weights, w1.float(), w2.float(), routing)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=2**-6)


def test_without_resident_experts_the_output_is_zero():
    routing = route(IDS, torch.full((3,), -1, dtype=torch.int32), 0)
    y = expert_mlp(
        torch.ones(4, 2), torch.ones(4, 2), torch.ones(0, 6, 2), torch.ones(0, 2, 3), routing
    )
    assert torch.equal(y, torch.zeros(4, 2))


def test_an_unknown_activation_is_refused():
    x, weights, w1, w2 = sample("silu")
    with pytest.raises(
        ValueError, match="must be 'swiglu', 'silu' or 'swiglu_clamped', got 'relu'"
    ):
        expert_mlp(x, weights, w1, w2, route(IDS, EXPERT_MAP, 2), "relu")
