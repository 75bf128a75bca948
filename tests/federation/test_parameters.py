# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a model is shared or belongs to one expert."""

from fomoe.federation.parameters import federated_tensors
from fomoe.nn import MoE, MoEConfig


def test_an_experts_biases_are_its_own_and_the_rest_of_the_layer_is_shared():
    config = MoEConfig(
        dim=6, expert_dim=4, num_experts=3, top_k=2, has_bias=True, bias_update_rate=1e-3,
        shared_expert_dim=5, shared_expert_gate=True,
    )  # fmt: skip
    tensors = federated_tensors(MoE(config, [0, 2]))
    shared = [f"shared_expert.{name}" for name in ("w1", "w2", "b1", "b2", "gate.weight")]
    assert [tensor.name for tensor in tensors if tensor.expert is None] == shared
    owned = [(tensor.name, tensor.expert) for tensor in tensors if not tensor.on_every_site]
    parts = ("w1", "w2", "b1", "b2")
    assert owned == [(f"experts.{e}.{part}", e) for e in (0, 2) for part in parts]


def test_a_full_routers_rows_are_experts_tensors_that_every_site_has():
    config = MoEConfig(dim=6, expert_dim=4, num_experts=3, top_k=2)
    rows = [t for t in federated_tensors(MoE(config, [1])) if t.expert is not None]
    names = [
        "router.0.weight",
        "router.1.weight",
        "experts.1.w1",
        "experts.1.w2",
        "router.2.weight",
    ]
    assert [tensor.name for tensor in rows] == names
    assert [t.on_every_site for t in rows] == [True, True, False, False, True]
    assert {tensor.layer for tensor in rows} == {0}


def test_a_partitioned_routers_row_goes_with_its_expert_and_the_others_are_nobodys():
    config = MoEConfig(dim=6, expert_dim=4, num_experts=3, top_k=2, router="partitioned")
    rows = federated_tensors(MoE(config, [1]))
    assert [tensor.name for tensor in rows] == ["router.1.weight", "experts.1.w1", "experts.1.w2"]
    assert not any(tensor.on_every_site for tensor in rows)
