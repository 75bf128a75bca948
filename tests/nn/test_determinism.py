# SPDX-License-Identifier: Apache-2.0
"""The same tokens give the same bits, whatever the number of threads, run after run."""

import pytest
import torch

from fomoe.nn import MoE, MoEConfig, initialize

LAYERS = {
    "fomoe": {"activation": "silu", "score": "sigmoid", "router": "partitioned"},
    "deepseek v3": {
        "score": "sigmoid", "renormalize": True, "num_groups": 4, "top_k_groups": 2,
        "group_score": "top2_sum", "bias_update_rate": 1e-3, "shared_expert_dim": 48,
        "shared_expert_gate": True, "capacity_factor": 1.0,
    },
    "gpt-oss": {"activation": "swiglu_clamped", "score_after_top_k": True, "has_bias": True},
}  # fmt: skip


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_a_training_step_gives_the_same_bits_every_time(settings, dtype, num_threads):
    torch.set_num_threads(num_threads)
    moe = MoE(MoEConfig(dim=64, expert_dim=48, num_experts=16, top_k=4, **settings), range(10))
    initialize(moe, seed=0)
    moe = moe.to(dtype)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    def step() -> list[torch.Tensor]:
        tokens = x.clone().requires_grad_()
        y = moe(tokens)
        loss = y.square().sum() + moe.auxiliary_loss
        return [y, loss, *torch.autograd.grad(loss, [tokens, *moe.parameters()])]

    first = step()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
