# SPDX-License-Identifier: Apache-2.0
"""What a Mixture-of-Experts layer computes: its shape, its router, its losses."""

from dataclasses import dataclass
from typing import Literal

from fomoe.nn.validation import (
    require_booleans,
    require_choice,
    require_integers,
    require_numbers,
)
from fomoe.ops.topk_gate import MAX_EXPERTS


@dataclass(kw_only=True, slots=True, frozen=True)
class MoEConfig:
    """Settings of one layer; raises ValueError naming the field that does not fit.

    A setting that would change nothing next to the others is refused, too. Some published layers:

    - FoMoE (arXiv 2606.19025): ``activation="silu", score="sigmoid"``, ``router`` full or
      partitioned. It names no auxiliary loss: both coefficients are our choice.
    - DeepSeek-V3 (arXiv 2412.19437): ``score="sigmoid", renormalize=True, scale=2.5,
      num_groups=8, top_k_groups=4, group_score="top2_sum", shared_expert_dim=2048,
      bias_update_rate=1e-3``.
    - gpt-oss: ``activation="swiglu_clamped", score_after_top_k=True, has_bias=True``.
    - Qwen2-MoE: ``shared_expert_dim=5632, shared_expert_gate=True``.
    """

    dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    activation: Literal["swiglu", "silu", "swiglu_clamped"] = "swiglu"  # silu: no gate matrix
    has_bias: bool = False  # of the router and of both projections of every expert
    # How experts are chosen.
    router_bias: bool = False  # of the router alone
    router: Literal["full", "partitioned"] = "full"  # partitioned: among the residents only
    num_groups: int = 1  # contiguous groups of experts; a token chooses in its best ones only
    top_k_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"  # of a group's members, for its rank
    bias_update_rate: float = 0.0  # step of the selection bias, see update_biases; 0: no bias
    capacity_factor: float | None = None  # x even load = most tokens an expert takes; None: all
    # What a chosen expert weighs.
    score: Literal["softmax", "sigmoid", "unit"] = "softmax"
    score_after_top_k: bool = False  # the softmax is over the chosen experts
    renormalize: bool = False  # divide a token's weights by their sum
    scale: float = 1.0  # factor on the weights
    # An expert that every token passes through.
    shared_expert_dim: int = 0  # its width; 0: there is none
    shared_expert_gate: bool = False  # weigh its output by sigmoid(gate . x)
    balance_loss_coefficient: float = 1e-2
    z_loss_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_integers(self, ("dim", "expert_dim", "num_experts", "top_k"), at_least=1)
        require_integers(self, ("num_groups", "top_k_groups"), at_least=1)
        require_integers(self, ("shared_expert_dim",), at_least=0)
        require_choice(self, "activation", ("swiglu", "silu", "swiglu_clamped"))
        require_choice(self, "router", ("full", "partitioned"))
        require_choice(self, "group_score", ("max", "top2_sum"))
        require_choice(self, "score", ("softmax", "sigmoid", "unit"))
        flags = (
            "has_bias",
            "router_bias",
            "score_after_top_k",
            "renormalize",
            "shared_expert_gate",
        )
        require_booleans(self, flags)
        require_numbers(self, ("scale",), above=0)
        if self.capacity_factor is not None:
            require_numbers(self, ("capacity_factor",), above=0)
        coefficients = ("bias_update_rate", "balance_loss_coefficient", "z_loss_coefficient")
        require_numbers(self, coefficients)
        self._require_enough_experts()
        self._require_effect()

    def _require_enough_experts(self) -> None:
        if self.num_experts > MAX_EXPERTS:
            raise ValueError(f"num_experts: expected at most {MAX_EXPERTS}, got {self.num_experts}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: expected at most num_experts = {self.num_experts}, got {self.top_k}"
            )
        if self.num_experts % self.num_groups != 0:
            raise ValueError(
                f"num_groups: expected a divisor of num_experts = {self.num_experts}, "
                f"got {self.num_groups}"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups: expected at most num_groups = {self.num_groups}, "
                f"got {self.top_k_groups}"
            )
        num_candidates = self.top_k_groups * (self.num_experts // self.num_groups)
        if self.top_k > num_candidates:
            raise ValueError(
                f"top_k: expected at most the {num_candidates} experts of "
                f"top_k_groups = {self.top_k_groups} groups, got {self.top_k}"
            )

    def _require_effect(self) -> None:
        if self.router_bias and self.has_bias:
            raise ValueError("router_bias: expected false, as has_bias includes it, got True")
        if self.score_after_top_k and self.score != "softmax":
            raise ValueError(
                f"score_after_top_k: expected false, as score = {self.score!r} is the same before "
                "and after, got True"
            )
        if self.group_score != "max" and self.num_groups == 1:
            raise ValueError(
                f"group_score: expected 'max', as num_groups = 1, got {self.group_score!r}"
            )
        if self.shared_expert_gate and self.shared_expert_dim == 0:
            raise ValueError(
                "shared_expert_gate: expected false, as shared_expert_dim = 0, got True"
            )
