# SPDX-License-Identifier: Apache-2.0
"""Balancing by a selection bias (arXiv 2408.15664), without a loss."""

import copy
import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from telling_layer import choosing, telling_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from fomoe.nn import MoE, MoEConfig, initialize, update_biases

RATE = 0.25


def layer(resident=None, **changes) -> MoE:
    return telling_layer(resident, **{"bias_update_rate": RATE} | changes)


def biases(moe: MoE) -> list[float]:
    return moe.load_balancer.bias.tolist()


def test_a_step_lowers_who_has_more_than_the_mean_and_lifts_who_has_less():
    moe = layer()
    moe(choosing(0, 0, 0, 1))  # loads 3, 1, 0, 0: the mean is 1
    update_biases(moe)
    assert biases(moe) == [-RATE, 0, RATE, RATE]


def test_the_bias_decides_who_is_chosen_and_not_what_they_weigh():
    moe, x = layer(), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    moe.load_balancer.bias.copy_(torch.tensor([-0.5, 0.0, 0.0, 3.0]))
    y = moe(x)
    torch.testing.assert_close(y, x.softmax(1) * torch.tensor([0, 0, 0, 1]))


def test_with_sigmoid_scores_the_bias_is_added_to_the_sigmoid():
    moe = layer(score="sigmoid")
    x = torch.tensor([[20.0, 10.0, 0.0, 0.0]])  # a logit 10 ahead, a sigmoid almost equal
    moe.load_balancer.bias.copy_(torch.tensor([0.0, RATE, 0.0, 0.0]))
    assert moe(x)[0].nonzero().item() == 1


def test_loads_add_up_until_the_step_and_then_start_anew():
    moe = layer()
    for expert in (0, 1, 2):
        moe(choosing(expert))
    update_biases(moe)
    assert biases(moe) == [-RATE, -RATE, -RATE, RATE]
    update_biases(moe)  # no tokens since
    assert biases(moe) == [-RATE, -RATE, -RATE, RATE]


def test_ghosts_and_dropped_tokens_are_load_like_any_other():
    moe = layer([1, 2], capacity_factor=1.0)
    moe(choosing(0, 0, 1, 1))
    update_biases(moe)
    assert biases(moe) == [-RATE, -RATE, RATE, RATE]


def test_a_partitioned_router_balances_its_residents_only():
    moe = layer([0, 2, 3], router="partitioned")
    moe(choosing(0, 0, 2))  # loads 2, 1, 0: the mean is 1
    update_biases(moe)
    assert biases(moe) == [-RATE, 0, 0, RATE]


def test_evaluation_leaves_no_trace():
    moe = layer().eval()
    moe(choosing(0))
    assert moe.statistics().load == (1.0, 0.0, 0.0, 0.0)
    update_biases(moe)
    assert biases(moe) == [0, 0, 0, 0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_is_not_counted_again(use_reentrant):
    moe = layer(score="sigmoid")
    x = choosing(0, 1, 1).requires_grad_()
    checkpoint(moe, x, use_reentrant=use_reentrant).sum().backward()
    assert moe.load_balancer.counts.tolist() == [1, 2, 0, 0]


def test_steps_even_out_a_router_that_prefers_one_expert():
    moe = layer(bias_update_rate=0.05)
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 2.0
    moe(x)
    assert moe.statistics().load_variation > 1.0
    for _ in range(60):
        moe(x)
        update_biases(moe)
    moe.reset_statistics()
    moe(x)
    assert moe.statistics().load_variation < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_stays_in_float32_whatever_the_layer_becomes(dtype):
    moe = layer(score="sigmoid")
    moe.load_balancer.bias.fill_(1.001)  # 1 in bfloat16
    exact = moe.load_balancer.bias.clone()
    for _ in range(2):
        moe.to(dtype)(choosing(0, 1).to(dtype))
        assert moe.load_balancer.bias.dtype == torch.float32
        assert torch.equal(moe.load_balancer.bias, exact)
    update_biases(moe)
    assert torch.equal(moe.load_balancer.bias.sub(exact).sign(), torch.tensor([-1.0, -1, 1, 1]))


def test_the_bias_is_state_and_the_counts_are_not():
    moe = layer()
    moe(choosing(0))
    update_biases(moe)
    moe(choosing(0))
    state = moe.state_dict()
    assert [name for name in state if name.startswith("load")] == ["load_balancer.bias"]
    twin = layer()
    twin.load_state_dict(state)
    assert biases(twin) == biases(moe) == biases(copy.deepcopy(moe)) == [-RATE, RATE, RATE, RATE]
    assert "load_balancer.bias" not in telling_layer().state_dict()


def test_a_bias_assigned_from_a_checkpoint_in_another_dtype_is_float32_again():
    moe, state = layer(), layer().bfloat16().state_dict()
    state["load_balancer.bias"] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)
    moe.load_state_dict(state, assign=True)
    assert moe.load_balancer.bias.dtype == torch.float32
    assert biases(moe) == [1, 2, 3, 4]


def test_a_layer_built_on_meta_has_its_buffers_once_initialised():
    with torch.device("meta"):
        moe = MoE(MoEConfig(dim=4, expert_dim=1, num_experts=4, top_k=1, bias_update_rate=RATE))
    moe = moe.bfloat16().to_empty(device="cpu")
    initialize(moe, seed=0)
    moe(choosing(0, 1, 2, 3).bfloat16())
    update_biases(moe)
    assert moe.load_balancer.bias.dtype == torch.float32
    assert sum(biases(moe)) == pytest.approx(0.0, abs=2 * RATE)


def test_models_and_layers_without_a_bias_are_left_alone():
    moe = telling_layer()
    moe(choosing(0))
    update_biases(nn.Sequential(nn.Linear(2, 2), moe))


def step_of_rank(rank: int, store: str) -> list[list[list[float]]]:
    """The biases of two layers on each of two ranks, after a step together."""
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout
    )
    try:
        model = nn.Sequential(layer(), layer())
        model[0](choosing(rank, rank, 2))
        model[1](choosing(3, 3 - rank))
        update_biases(model, dist.group.WORLD)
        everyone = [None, None]
        dist.all_gather_object(everyone, [biases(moe) for moe in model])
        return everyone
    finally:
        dist.destroy_process_group()


def test_ranks_make_the_same_step_for_their_tokens_together_in_one_collective(
    tmp_path, monkeypatch
):
    store = str(tmp_path / "store")
    other = multiprocessing.get_context("spawn").Process(target=step_of_rank, args=(1, store))
    other.start()
    collectives, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda *a, **k: (collectives.append("all_reduce"), all_reduce(*a, **k))
    )
    here, there = step_of_rank(0, store)
    other.join()
    # The first layer: 2, 2, 2, 0 of a mean 1.5. The second: 0, 0, 1, 3 of a mean 1.
    assert here == there == [[-RATE, -RATE, -RATE, RATE], [RATE, RATE, 0, -RATE]]
    assert collectives == ["all_reduce"]
