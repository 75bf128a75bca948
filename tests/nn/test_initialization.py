# SPDX-License-Identifier: Apache-2.0
"""Initial weights come from the seed and the tensor's name alone."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from fomoe.nn import MoE, MoEConfig, initialize, named_tensors

CONFIG = MoEConfig(dim=64, expert_dim=32, num_experts=8, top_k=2)


def model(resident=None) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64, bias=False), MoE(CONFIG, resident))


def test_a_tensor_is_drawn_by_the_documented_recipe():
    moe = model([2, 5])
    initialize(moe, seed=42)
    digest = hashlib.sha256(b"42:1.experts.5.w1").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    expected = torch.randn(64, 64, generator=generator) * (1 / 8)  # 1 / sqrt(64)
    assert torch.equal(moe[1].experts.w1[1], expected)


def test_two_sites_agree_on_everything_both_hold():
    first, second, full = model([0, 2, 5]), model([2, 5, 7]), model()
    for site in (first, second, full):
        initialize(site, seed=0)
    tensors = dict(named_tensors(full))
    for site in (first, second):
        for name, tensor in named_tensors(site):
            assert torch.equal(tensor, tensors[name]), name


def test_vectors_are_ones_and_matrices_have_the_fan_in_scale():
    moe = model()
    initialize(moe, seed=1)
    assert torch.equal(moe[0].weight, torch.ones(64))
    assert moe[1].experts.w1.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert moe[1].experts.w2.std().item() == pytest.approx(32**-0.5, rel=0.02)


def test_biases_are_zeros_whatever_their_shape():
    config = replace(CONFIG, has_bias=True, shared_expert_dim=16)
    moe = nn.Sequential(nn.Linear(64, 64), MoE(config, [2, 5]))
    for parameter in moe.parameters():
        nn.init.ones_(parameter)
    initialize(moe, seed=1)
    biases = [moe[0].bias, moe[1].router.bias]
    for experts in (moe[1].experts, moe[1].shared_expert):
        biases += [experts.b1, experts.b2]
    assert all(torch.equal(bias, torch.zeros_like(bias)) for bias in biases)


def test_experts_layers_and_seeds_differ():
    a, b = model(), model()
    initialize(a, seed=0)
    initialize(b, seed=1)
    w1 = a[1].experts.w1
    assert not torch.equal(w1[0], w1[1])
    assert not torch.equal(w1, b[1].experts.w1)


def test_the_global_generator_is_left_alone():
    moe = model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    initialize(moe, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_lower_precision_is_the_rounded_float32_value():
    wide, narrow = model(), model().bfloat16()
    initialize(wide, seed=0)
    initialize(narrow, seed=0)
    assert torch.equal(narrow[1].experts.w1, wide[1].experts.w1.bfloat16())


def test_a_model_built_on_meta_works_once_initialised():
    with torch.device("meta"):
        late = model([2, 5])
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        initialize(late, seed=0)
    late = late.to_empty(device="cpu")
    initialize(late, seed=0)
    early = model([2, 5])
    initialize(early, seed=0)
    x = torch.randn(5, 64)
    assert torch.equal(late(x), early(x))
    assert late[1].statistics() == early[1].statistics()
