# SPDX-License-Identifier: Apache-2.0
"""The layer with the tools people train with: autocast, checkpointing, optimizers."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fomoe.nn import MoE, MoEConfig, initialize

CONFIG = MoEConfig(dim=16, expert_dim=8, num_experts=6, top_k=2)


DEEPSEEK = replace(
    CONFIG, score="sigmoid", renormalize=True, num_groups=3, top_k_groups=2, group_score="top2_sum",
    bias_update_rate=1e-3, shared_expert_dim=4, capacity_factor=1.0,
)  # fmt: skip


def layer(resident=None, config=CONFIG) -> MoE:
    moe = MoE(config, resident)
    initialize(moe, seed=0)
    return moe


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))


def test_autocast_computes_experts_in_bf16_and_routes_in_float32():
    moe, x = layer((0, 2, 5)), tokens(64)
    exact = moe(x)
    choices, loss = moe.statistics(), moe.auxiliary_loss
    moe.reset_statistics()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert moe.statistics() == choices
    assert torch.equal(moe.auxiliary_loss, loss)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)


def test_autocast_gradients_reach_the_float32_masters():
    moe, x = layer(), tokens(64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = moe(x).float().square().sum() + moe.auxiliary_loss
    loss.backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


def test_autocast_leaves_float64_alone():
    moe, x = layer().double(), tokens(4).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert torch.equal(y, moe(x))


class Block(nn.Module):
    """The layer between two others, as in a model whose blocks are checkpointed."""

    def __init__(self, config=CONFIG) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.moe = layer((0, 1, 4), config)

    def forward(self, x):
        return self.after(torch.tanh(self.moe(self.before(x))))


def losses_and_gradients(block: Block, checkpointed: bool):
    x = tokens(32).requires_grad_()
    y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    loss = y.square().sum() + block.moe.auxiliary_loss
    return loss, torch.autograd.grad(loss, [x, *block.parameters()])


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("router", ["full", "partitioned"])
@pytest.mark.parametrize("config", [CONFIG, DEEPSEEK], ids=["plain", "deepseek v3"])
def test_checkpointing_changes_no_bit_and_counts_no_token_twice(config, router, ties):
    """Even where logits tie, so that choices would flip (NeMo Automodel#3140, torchtitan#3336)."""
    block = Block(replace(config, router=router))
    if ties:  # equal rows would not do: a GEMM may sum its last columns in another order
        nn.init.zeros_(block.moe.router.weight)
    loss, gradients = losses_and_gradients(block, checkpointed=False)
    counts = {name: buffer.clone() for name, buffer in block.moe.named_buffers()}
    if ties:
        assert block.moe.expert_counts.tolist() == [32, 32, 0, 0, 0, 0]
    block.moe.reset_buffers()

    again, recomputed = losses_and_gradients(block, checkpointed=True)

    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients, strict=True))
    for name, buffer in block.moe.named_buffers():
        assert torch.equal(buffer, counts[name]), name


def test_checkpointing_frees_what_backward_recomputed():
    block, activations = Block(), []

    def watch(module, inputs, output):
        activations.append(weakref.ref(output.untyped_storage()))

    block.before.register_forward_hook(watch)
    losses_and_gradients(block, checkpointed=True)
    gc.collect()
    assert [activation() for activation in activations] == [None, None]


def test_an_optimizer_step_lowers_the_loss_with_ghosts():
    moe, x, target = layer((0, 1, 4)), tokens(64), tokens(64).flip(0)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2, foreach=False)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(moe(x), target) + moe.auxiliary_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(moe.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_site_without_experts_takes_an_optimizer_step():
    moe = layer(())
    router = moe.router.weight.clone()
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2, foreach=False)
    (moe(tokens(8)).sum() + moe.auxiliary_loss).backward()
    nn.utils.clip_grad_norm_(moe.parameters(), 1.0)
    optimizer.step()
    assert not torch.equal(moe.router.weight, router)
    assert moe.router.weight.isfinite().all()


def test_functional_calls_use_the_given_parameters():
    moe, x = layer(), tokens(5)
    zeroed = dict(moe.named_parameters()) | {"experts.w2": torch.zeros_like(moe.experts.w2)}
    assert torch.equal(torch.func.functional_call(moe, zeroed, x), torch.zeros_like(x))


@pytest.mark.parametrize("top_k", [1, 6])
def test_a_nan_token_spoils_no_other_token(top_k):
    moe = MoE(MoEConfig(dim=16, expert_dim=8, num_experts=6, top_k=top_k))
    x = tokens(5)
    spoilt = x.clone()
    spoilt[2] = float("nan")
    y = moe(spoilt)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], moe(x)[others])
    assert y[2].isnan().all()
