# SPDX-License-Identifier: Apache-2.0
"""An expert-parallel layer against the same layer in one process."""

import pytest
import torch
from layers import generator, random_owners

from fomoe import MoE, MoEConfig
from fomoe.comm import ExpertExchange, Topology, run_ranks
from fomoe.nn import initialize

MESHES = [(4,), (2, 2), (1, 1, 1, 1), (3, 1)]
CONFIG = {
    "softmax": MoEConfig(dim=12, expert_dim=10, num_experts=8, top_k=3),
    "sigmoid, shared expert, biases": MoEConfig(
        dim=12,
        expert_dim=10,
        num_experts=8,
        top_k=3,
        score="sigmoid",
        shared_expert_dim=6,
        has_bias=True,
    ),
    "partitioned": MoEConfig(
        dim=12, expert_dim=10, num_experts=8, top_k=3, router="partitioned", score="sigmoid"
    ),
}
NUM_TOKENS = (5, 0, 3, 7)


@pytest.mark.parametrize("sites", MESHES, ids=str)
@pytest.mark.parametrize("ghosts", [False, True], ids=["dropless", "ghosts"])
@pytest.mark.parametrize("config", CONFIG.values(), ids=CONFIG)
def test_it_equals_the_layer_of_one_process(sites, ghosts, config):
    topology = Topology(sites)
    owners = random_owners(topology, 7, ghosts)
    tokens = [_tokens(rank) for rank in range(4)]

    def program(transport):
        moe = MoE(config, exchange=ExpertExchange(transport, owners)).double()
        return _run(moe, tokens[transport.rank]), _by_expert(moe), moe.statistics()

    single = MoE(config, [e for e, owner in enumerate(owners) if owner >= 0]).double()
    outputs, input_gradients = _run(single, torch.cat(tokens))
    right = _by_expert(single)
    everyone = run_ranks(topology, program)
    _equal(torch.cat([y for (y, _), _, _ in everyone]), outputs)
    _equal(torch.cat([g for (_, g), _, _ in everyone]), input_gradients)
    # The gradient of what is shared is a sum over ranks, that of an expert is its owner's.
    for name, gradient in right.items():
        ours = [theirs[name] for _, theirs, _ in everyone if name in theirs]
        assert len(ours) == (1 if name.startswith("experts.") else 4)
        _equal(torch.stack(ours).sum(0), gradient)
    shares = [(s.ghost_share, n) for (_, _, s), n in zip(everyone, NUM_TOKENS, strict=True) if n]
    ghost_share = sum(share * n for share, n in shares) / sum(NUM_TOKENS)
    assert ghost_share == pytest.approx(single.statistics().ghost_share)


def test_under_autocast_rows_travel_in_its_dtype():
    config, owners = CONFIG["softmax"], [0, 1] * 4

    def program(transport):
        exchange = ExpertExchange(transport, owners)
        moe = MoE(config, exchange=exchange)
        initialize(moe, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = moe(torch.ones(1, 12))
        return y, exchange.bytes_sent["inter_site"] + exchange.bytes_sent["intra_node"]

    single = MoE(config)
    initialize(single, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = single(torch.ones(1, 12))
    sent = []
    for y, num_bytes in run_ranks(Topology([2]), program):
        torch.testing.assert_close(y, right, rtol=0.02, atol=0.02)
        sent.append(num_bytes)
    counts, there, back = (3 + 1 + 2) * 8, 12 * 2 + 3 * 8, 12 * 2
    assert set(sent) == {counts + there + back}


def test_a_layer_refuses_an_exchange_that_does_not_fit():
    def program(transport):
        exchange = ExpertExchange(transport, [0] * 8)
        with pytest.raises(ValueError, match="resident_experts: expected none beside exchange"):
            MoE(CONFIG["softmax"], [0], exchange)
        with pytest.raises(ValueError, match="owners of num_experts = 4 experts, got 8"):
            MoE(MoEConfig(dim=4, expert_dim=4, num_experts=4, top_k=1), exchange=exchange)
        limited = MoEConfig(dim=4, expert_dim=4, num_experts=8, top_k=1, capacity_factor=1.5)
        with pytest.raises(ValueError, match="expert-parallel layer, got 1"):
            MoE(limited, exchange=exchange)

    run_ranks(Topology([1]), program)


def _tokens(rank):
    return torch.randn(NUM_TOKENS[rank], 12, generator=generator(rank), dtype=torch.float64)


def _run(moe, tokens):
    """Outputs and input gradients of sum(y * cos(y))."""
    initialize(moe, 3)
    x = tokens.clone().requires_grad_()
    y = moe(x)
    (y * y.cos()).sum().backward()
    return y.detach(), x.grad


def _by_expert(moe):
    """Gradients by name; of stacked experts those of each by itself."""
    gradients = {}
    for name, parameter in moe.named_parameters():
        if name.startswith("experts."):
            for expert, gradient in zip(moe.experts.expert_ids, parameter.grad, strict=True):
                gradients[f"{name}.{expert}"] = gradient
        else:
            gradients[name] = parameter.grad
    return gradients


def _equal(ours, right):
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)
