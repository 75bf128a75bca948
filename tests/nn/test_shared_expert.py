# SPDX-License-Identifier: Apache-2.0
"""The expert that every token passes through."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomoe.nn import MoE, MoEConfig, initialize, named_tensors


def layer(resident=(), **changes) -> MoE:
    """Without residents the output is the shared expert's alone."""
    shape = {"dim": 6, "expert_dim": 4, "num_experts": 3, "top_k": 2, "shared_expert_dim": 5}
    moe = MoE(MoEConfig(**shape | changes), resident)
    initialize(moe, seed=0)
    return moe


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1))


def test_the_output_is_the_feed_forward_network_for_every_token():
    moe, x = layer(), tokens(2, 7)
    gate, up = F.linear(x, moe.shared_expert.w1).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, moe.shared_expert.w2)
    torch.testing.assert_close(moe(x), expected)


def test_biases_are_added_before_the_activation_and_at_the_end():
    moe, x = layer(activation="silu", has_bias=True), tokens(7)
    shared = moe.shared_expert
    nn.init.normal_(shared.b1)
    nn.init.normal_(shared.b2)
    expected = F.linear(F.silu(F.linear(x, shared.w1, shared.b1)), shared.w2, shared.b2)
    torch.testing.assert_close(moe(x), expected)


def test_a_gate_weighs_the_output_by_its_sigmoid():
    moe, x = layer(shared_expert_gate=True), tokens(7)
    expected = layer()(x) * (x @ moe.shared_expert.gate.weight.T).sigmoid()
    torch.testing.assert_close(moe(x), expected)


def test_it_is_added_to_what_the_chosen_experts_say():
    x = tokens(7)
    both, shared, chosen = layer([0, 2]), layer(), layer([0, 2], shared_expert_dim=0)
    torch.testing.assert_close(both(x), shared(x) + chosen(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_to_the_bit_an_expert_that_everyone_chooses(dtype):
    shared = layer().to(dtype)
    x = tokens(9).to(dtype)
    routed = MoE(MoEConfig(dim=6, expert_dim=5, num_experts=1, top_k=1, score="unit")).to(dtype)
    with torch.no_grad():
        routed.experts.w1.copy_(shared.shared_expert.w1[None])
        routed.experts.w2.copy_(shared.shared_expert.w2[None])
    assert torch.equal(shared(x), routed(x))


def test_autocast_computes_it_in_bf16_with_the_gate_in_float32():
    moe, x = layer([0, 2], shared_expert_gate=True, has_bias=True), tokens(64)
    exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    (y.float().square().sum() + moe.auxiliary_loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())
    assert moe.shared_expert.gate.weight.grad.abs().sum() > 0


def test_its_tensors_belong_to_no_expert():
    moe = layer([0, 2], has_bias=True, shared_expert_gate=True)
    names = [name for name, _ in named_tensors(moe) if name.startswith("shared_expert.")]
    assert names == [f"shared_expert.{name}" for name in ("w1", "w2", "b1", "b2", "gate.weight")]


def test_without_tokens_it_trains_without_nan():
    moe = layer(shared_expert_gate=True)
    (moe(tokens(0)).sum() + moe.auxiliary_loss).backward()
    assert torch.equal(moe.shared_expert.w1.grad, torch.zeros_like(moe.shared_expert.w1))
