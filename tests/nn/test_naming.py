# SPDX-License-Identifier: Apache-2.0
"""Names of tensors, with experts one by one."""

import pytest
import torch
from torch import nn

from fomoe.nn import MoE, MoEConfig, expert_tensor_name, named_tensors

CONFIG = MoEConfig(dim=4, expert_dim=2, num_experts=20, top_k=1)


def test_the_id_goes_before_the_last_component():
    name = expert_tensor_name("layers.3.moe.experts.w1", 17)
    assert name == "layers.3.moe.experts.17.w1"
    assert expert_tensor_name("w1", 17) == "17.w1"


def test_experts_are_listed_one_by_one_and_the_rest_as_it_is():
    model = nn.Sequential(MoE(CONFIG, [3, 17]), nn.Linear(4, 4, bias=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    assert shapes == {
        **{f"0.router.{expert}.weight": (4,) for expert in range(20)},
        "0.experts.3.w1": (4, 4),
        "0.experts.17.w1": (4, 4),
        "0.experts.3.w2": (4, 2),
        "0.experts.17.w2": (4, 2),
        "1.weight": (4, 4),
    }


def test_writing_to_a_listed_tensor_writes_to_the_model():
    moe = MoE(CONFIG, [3, 17])
    dict(named_tensors(moe))["experts.17.w2"].fill_(7.0)
    assert (moe.experts.w2[1] == 7.0).all()
    assert not (moe.experts.w2[0] == 7.0).any()


def test_a_shared_parameter_is_listed_once():
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    assert [name for name, _ in named_tensors(model)] == ["0.weight"]


def test_any_module_with_expert_ids_is_taken_apart():
    class Stack(nn.Module):
        def __init__(self, expert_ids):
            super().__init__()
            self.expert_ids = expert_ids
            self.bias = nn.Parameter(torch.zeros(2, 3))

    assert [name for name, _ in named_tensors(Stack((5, 9)))] == ["5.bias", "9.bias"]
    with pytest.raises(ValueError, match="one row per entry of expert_ids, 3, got 2"):
        list(named_tensors(Stack((5, 9, 11))))
