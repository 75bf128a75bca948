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
    shared = ["router.weight", "router.bias"]
    shared += [f"shared_expert.{name}" for name in ("w1", "w2", "b1", "b2", "gate.weight")]
    assert [tensor.name for tensor in tensors if tensor.is_shared] == shared
    owned = [(tensor.name, tensor.expert) for tensor in tensors if not tensor.is_shared]
    parts = ("w1", "w2", "b1", "b2")
    assert owned == [(f"experts.{e}.{part}", e) for e in (0, 2) for part in parts]
