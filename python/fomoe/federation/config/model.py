# SPDX-License-Identifier: Apache-2.0
"""The section [model]. Imports no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fomoe.federation.config.section import (
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Section,
    Text,
)

__all__ = ["ModelConfig"]

# What names a whole model, and what may be set beside it.
_NAMED = {"name": ("vocab_size", "router"), "checkpoint": ("router",)}
_ONLY_FOE = {"softmax_over"}
_ONLY_DECODER = {
    "router", "router_bias", "num_groups", "top_k_groups", "group_score", "capacity_factor",
    "score_after_top_k", "shared_expert_dim", "shared_expert_gate", "dense_layers", "dense_dim",
    "qkv_bias", "attention_output_bias", "head_norm", "sliding_window",
}  # fmt: skip


class ModelConfig(Section):
    """The model: the fields of fomoe.models.DecoderConfig, with `family` "foe" those of FoEConfig;
    or `name`, a named one; or `checkpoint`, a model to go on from.

    With `name`, only `vocab_size` and `router` may be set beside it, with `checkpoint` only
    `router`; they win over what is named.
    """

    name: str | None = None
    checkpoint: Annotated[Text, Field(min_length=1)] | None = None
    """A model file, or the folder of one, whose weights every site starts from."""
    family: Literal["decoder", "foe"] = "decoder"
    """foe: a Federation of Experts, with a group of experts for every key/value head."""
    vocab_size: Annotated[int, Field(ge=256)] = 256
    dim: Count = 256
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count = Field(default_factory=lambda known: known.get("num_heads", 1))
    """Defaults to num_heads."""
    head_dim: Count = Field(
        default_factory=lambda known: max(1, known.get("dim", 1) // known.get("num_heads", 1))
    )
    """Defaults to dim / num_heads."""
    expert_dim: Count = 128
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8
    top_k: Count = 2
    activation: Literal["swiglu", "silu"] = "swiglu"
    router: Literal["full", "partitioned"] = "full"
    """partitioned: a site scores its residents only, and no token skips an expert."""
    router_bias: bool = False
    num_groups: Count = 1
    top_k_groups: Count = 1
    group_score: Literal["max", "top2_sum"] = "max"
    capacity_factor: NotNegative = 0.0
    """Times the even load: most tokens an expert takes of a batch. 0: all."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_after_top_k: bool = False
    renormalize: bool = False
    softmax_over: Literal["group", "all"] = "group"
    """Experts that the scores of a FoE are a softmax over."""
    scale: Positive = 1.0
    shared_expert_dim: CountOrZero = 0
    shared_expert_gate: bool = False
    dense_layers: Annotated[tuple[CountOrZero, ...], Field(strict=False)] = ()
    """Layers, from 0, with a feed-forward block of width `dense_dim` instead of experts."""
    dense_dim: CountOrZero = 0
    qkv_bias: bool = False
    attention_output_bias: bool = False
    head_norm: bool = False
    sliding_window: CountOrZero = 0
    norm: Literal["pre", "peri"] = "pre"
    residual_scale: Positive = 1.0
    tie_embeddings: bool = True
    rope_theta: Positive = 10000.0
    norm_epsilon: Positive = 1e-6
    balance_loss_coefficient: NotNegative = 1e-2
    z_loss_coefficient: NotNegative = 1e-3

    def shape(self) -> dict[str, Any]:
        """The fields of the family's configuration, by name."""
        other = _ONLY_FOE if self.family == "decoder" else _ONLY_DECODER
        return self.model_dump(exclude={"name", "checkpoint", *other})

    @property
    def is_named(self) -> bool:
        """Whether the shape is elsewhere, and the fields here mean nothing unless they are set."""
        return any(getattr(self, key) is not None for key in _NAMED)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, beside in _NAMED.items():
            value = getattr(self, key)
            others = sorted(self.model_fields_set - {key, *beside})
            if value is not None and others:
                raise ValueError(
                    f"model.{key} = {value!r} fixes the model, "
                    f"so model.{others[0]} cannot be set as well"
                )
        if self.is_named:
            return self
        unknown = _ONLY_FOE if self.family == "decoder" else _ONLY_DECODER
        for key in sorted(unknown):
            if getattr(self, key) == type(self).model_fields[key].default:
                continue
            raise ValueError(f"model.family = {self.family!r} has no setting model.{key}")
        if "head_dim" not in self.model_fields_set and self.dim % self.num_heads:
            raise ValueError(
                f"model.dim = {self.dim} is not divisible by model.num_heads = {self.num_heads} "
                "(or set model.head_dim)"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim = {self.head_dim} must be even, for the rotary embedding"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not divisible by "
                f"model.num_kv_heads = {self.num_kv_heads}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k = {self.top_k} is larger than model.num_experts = {self.num_experts}"
            )
        return self
