# SPDX-License-Identifier: Apache-2.0
"""Captured in a CUDA graph once, replayed on other inputs: the bits of eager."""

import op_calls
import pytest
import torch
from on_device import EVEN, ON_BOTH, replayable, results_on
from op_calls import assert_same_bits, call_of
from samples import SAMPLES, leaf, name_of

from fomoe import MoE, MoEConfig, ops
from fomoe.generate import Generation, Sampling, cuda_graphs, generate
from fomoe.models import build_model, config_from_dict
from fomoe.nn import initialize


def other(tensor):
    """Another valid value for an input: floats change, tables stay."""
    return -tensor.flip(0) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("sample", [SAMPLES[0], EVEN], ids=name_of)
@pytest.mark.parametrize("name", op_calls.ALL)
@pytest.mark.parametrize("device", ON_BOTH)
def test_forward_and_backward_of_an_op(device, name, sample, dtype):
    function, tensors = call_of(name, sample, dtype)
    fixed = {key: tensor.to(device) for key, tensor in tensors.items()}
    replay = replayable(lambda: results_on(device, (function, fixed)), device)
    for change in (lambda t: t, other, lambda t: t):
        given = {key: change(tensor) for key, tensor in tensors.items()}
        for key, tensor in given.items():
            fixed[key].copy_(tensor)
        assert_same_bits(replay(), results_on(device, (function, given)))


@pytest.mark.parametrize("device", ON_BOTH)
def test_routing_and_experts_with_loads_that_change_between_replays(device):
    tokens, experts = 48, 6
    shapes = {"logits": (tokens, experts), "x": (tokens, 64), "w1": (4, 64, 64), "w2": (4, 64, 32)}
    generator = torch.Generator().manual_seed(0)
    draws = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    draws[1]["logits"][:, 3] += 10  # nearly everything to one expert
    draws[2]["logits"][:, 4:] += 10  # and to ghosts
    fixed = {name: value.to(device, torch.bfloat16) for name, value in draws[0].items()}
    expert_map = torch.tensor([1, 0, 3, 2, -1, -1], dtype=torch.int32, device=device)

    def step(inputs):
        leaves = [leaf(tensor) for tensor in inputs.values()]
        logits, x, w1, w2 = leaves
        gate = ops.topk_gate(logits, 2)
        y = ops.expert_mlp(x, gate.weights, w1, w2, ops.route(gate.ids, expert_map, 4))
        loss = y.float().square().sum() + gate.z_sum
        return [y.detach(), *torch.autograd.grad(loss, leaves)]

    replay = replayable(lambda: step(fixed), device)
    for draw in (*draws, draws[0]):
        for name, value in draw.items():
            fixed[name].copy_(value)
        actual = replay()
        assert_same_bits(actual, step({name: value.clone() for name, value in fixed.items()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("device", ON_BOTH)
def test_a_layer_in_training(device, dtype):
    moe = MoE(MoEConfig(dim=64, expert_dim=32, num_experts=8, top_k=2), resident_experts=range(6))
    initialize(moe, seed=0)
    moe.to(device, dtype)
    x = torch.randn(32, 64).to(device, dtype).requires_grad_()
    parameters = [x, *moe.parameters()]

    def step():
        y = moe(x)
        loss = y.float().square().mean() + moe.auxiliary_loss
        return [y.detach(), *torch.autograd.grad(loss, parameters)]

    replay = replayable(step, device)
    for seed in range(3):
        values = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        x.data.copy_(values)
        assert_same_bits(replay(), step())


@pytest.mark.parametrize("family", ["decoder", "foe"])
@pytest.mark.parametrize("device", ON_BOTH)
def test_generation(device, family):
    shape = {"vocab_size": 64, "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
             "head_dim": 16, "expert_dim": 32, "num_experts": 8, "top_k": 2}  # fmt: skip
    model = build_model(config_from_dict({"family": family, **shape}))
    initialize(model, seed=0)
    model.to(device).eval()
    prompts = [[1, 2, 3], [4], [5] * 250]  # the longest reaches a second graph
    settings = Generation(max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=2))
    expected = generate(model, prompts, settings)
    capture = cuda_graphs(torch.device(device)) if device != "cpu" else None
    for _ in range(2):
        assert generate(model, prompts, settings, capture=capture) == expected
