# SPDX-License-Identifier: Apache-2.0
"""Settings of the layer that do not fit are refused in one sentence that names the field."""

import pytest

from fomoe.nn import MoEConfig

SHAPE = {"dim": 4, "expert_dim": 4, "num_experts": 6, "top_k": 2}
GROUPS = {"num_groups": 3, "top_k_groups": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim: expected an integer of at least 1, got 0"),
        ({"expert_dim": 2.0}, "expert_dim: expected an integer of at least 1, got 2.0"),
        ({"num_experts": True}, "num_experts: expected an integer of at least 1, got True"),
        ({"num_experts": 5000}, "num_experts: expected at most 4096, got 5000"),
        ({"top_k": 7}, "top_k: expected at most num_experts = 6, got 7"),
        ({"activation": "relu"}, "activation: expected one of swiglu, silu, swiglu_clamped, got "),
        ({"has_bias": 0}, "has_bias: expected true or false, got 0"),
        ({"router_bias": 0}, "router_bias: expected true or false, got 0"),
        (
            {"router_bias": True, "has_bias": True},
            "router_bias: expected false, as has_bias includes it",
        ),
        ({"router": "half"}, "router: expected one of full, partitioned, got 'half'"),
        ({"num_groups": 0}, "num_groups: expected an integer of at least 1, got 0"),
        ({"num_groups": 4}, "num_groups: expected a divisor of num_experts = 6, got 4"),
        ({"top_k_groups": 2}, "top_k_groups: expected at most num_groups = 1, got 2"),
        (GROUPS | {"top_k": 5}, "top_k: expected at most the 4 experts of top_k_groups = 2 groups"),
        (GROUPS | {"group_score": "sum"}, "group_score: expected one of max, top2_sum, got 'sum'"),
        ({"group_score": "top2_sum"}, "group_score: expected 'max', as num_groups = 1, got"),
        ({"bias_update_rate": -1}, "bias_update_rate: expected a finite .* at least 0, got -1"),
        ({"capacity_factor": 0.0}, "capacity_factor: expected a finite number above 0, got 0.0"),
        ({"score": "relu"}, "score: expected one of softmax, sigmoid, unit, got 'relu'"),
        (
            {"score": "sigmoid", "score_after_top_k": True},
            "score_after_top_k: expected false, as score = 'sigmoid' is the same before and after",
        ),
        ({"renormalize": 1}, "renormalize: expected true or false, got 1"),
        ({"scale": 0.0}, "scale: expected a finite number above 0, got 0.0"),
        ({"shared_expert_dim": -1}, "shared_expert_dim: expected an integer of at least 0, got -1"),
        ({"shared_expert_gate": True}, "shared_expert_gate: expected false, as shared_expert_dim "),
        ({"z_loss_coefficient": -1e-3}, "z_loss_coefficient: expected .* at least 0, got -0.001"),
        ({"balance_loss_coefficient": float("nan")}, "balance_loss_coefficient: .* got nan"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MoEConfig(**SHAPE | changes)


def test_as_many_choices_as_the_chosen_groups_have_experts_are_accepted():
    assert MoEConfig(**SHAPE | GROUPS | {"top_k": 4}).top_k == 4
