# SPDX-License-Identifier: Apache-2.0
"""How many parameters a model has, without building it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.language_model_config import LanguageModelConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class ParameterCount:
    """Parameters by part; a tied embedding counts once."""

    embedding: int  # with the unembedding, if it is not tied
    attention: int  # without the norms of its heads
    router: int
    experts: int
    shared_experts: int  # those that every token passes through
    dense: int  # the feed-forward blocks of dense layers
    norms: int

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.attention
            + self.router
            + self.experts
            + self.shared_experts
            + self.dense
            + self.norms
        )


def parameter_count(
    config: LanguageModelConfig, resident_experts: Sequence[Sequence[int]] | None = None
) -> ParameterCount:
    """Count the parameters of a model with these residents per layer, in closed form."""
    if not isinstance(config, DecoderConfig):  # a FoE has those of a decoder of the same shape
        common = fields(LanguageModelConfig)
        config = DecoderConfig(**{field.name: getattr(config, field.name) for field in common})
    num_moe = len(config.moe_layers)
    num_residents = (
        num_moe * config.num_experts
        if resident_experts is None
        else sum(len(ids) for ids in resident_experts)
    )
    num_matrices = 2 if config.activation == "silu" else 3
    inputs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim  # query, key, value
    matrices = (inputs + config.num_heads * config.head_dim) * config.dim
    biases = config.qkv_bias * inputs + config.attention_output_bias * config.dim
    num_norms = 4 * config.num_layers + 2 if config.norm == "peri" else 2 * config.num_layers + 1
    head_norms = config.head_norm * config.num_layers * 2 * config.head_dim
    return ParameterCount(
        embedding=(1 if config.tie_embeddings else 2) * config.vocab_size * config.dim,
        attention=config.num_layers * (matrices + biases),
        router=num_moe * config.num_experts * (config.dim + config.router_bias),
        experts=num_residents * num_matrices * config.expert_dim * config.dim,
        shared_experts=num_moe
        * config.dim
        * (num_matrices * config.shared_expert_dim + config.shared_expert_gate),
        dense=len(config.dense_layers) * 3 * config.dense_dim * config.dim,
        norms=num_norms * config.dim + head_norms,
    )
